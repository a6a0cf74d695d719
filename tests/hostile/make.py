#!/usr/bin/env python3
"""Makes a corpus of hostile images: make.py DIRECTORY

One folder per case, with `case.json` (expect: "refused" or "contained"; say: words that the error must have), the
manifest, and the blobs by digest. A blob may lie about its digest: the file name is what the manifest claims.
"""
import gzip
import hashlib
import io
import json
import os
import sys
import tarfile

OUT = sys.argv[1]
LAYER = "application/vnd.oci.image.layer.v1.tar"
BUSYBOX = open("/bin/busybox", "rb").read()


def digest(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


def entry(name, kind=tarfile.REGTYPE, data=b"", link="", mode=0o755, size=None, pax=None, device=(0, 0)):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, link, mode
    info.size = len(data) if size is None else size
    info.devmajor, info.devminor = device
    info.pax_headers = pax or {}
    head = info.tobuf(format=tarfile.PAX_FORMAT, errors="surrogateescape")
    return head + data + b"\0" * (-len(data) % 512)


def tar(*entries):
    return b"".join(entries) + b"\0" * 1024


def raw_header(name, size_field, kind=b"0"):
    """A ustar header whose size field is any 12 bytes."""
    head = bytearray(512)
    head[0 : len(name)] = name
    head[100:108] = b"0000644\0"
    head[108:116] = head[116:124] = b"0000000\0"
    head[124:136] = size_field
    head[136:148] = b"00000000000\0"
    head[148:156] = b" " * 8
    head[156:157] = kind
    head[257:265] = b"ustar\00000"
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


def case(name, tars, expect="refused", say=(), config=None, diff_ids=None, blobs=None, sizes=None, media=None, manifest=None):
    """blobs: replaces the bytes served for layer i; sizes, diff_ids, media: what is claimed of it."""
    folder = os.path.join(OUT, name)
    os.makedirs(os.path.join(folder, "blobs"))
    packed = [gzip.compress(data, 1, mtime=0) for data in tars]
    ids = diff_ids or [digest(data) for data in tars]
    body = {"architecture": "amd64", "os": "linux", "config": {"Env": ["PATH=/bin"], **(config or {})},
            "rootfs": {"type": "layers", "diff_ids": ids}}
    body = json.dumps(body).encode()
    layers = []
    for index, blob in enumerate(packed):
        claimed = digest(blob)
        served = (blobs or {}).get(index, blob)
        with open(os.path.join(folder, "blobs", claimed.replace(":", "-")), "wb") as file:
            file.write(served)
        layers.append({"mediaType": (media or {}).get(index, LAYER + "+gzip"), "digest": claimed,
                       "size": (sizes or {}).get(index, len(blob))})
    with open(os.path.join(folder, "blobs", digest(body).replace(":", "-")), "wb") as file:
        file.write(body)
    document = manifest if manifest is not None else {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
                            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest(body),
                                       "size": len(body)}, "layers": layers}
    with open(os.path.join(folder, "manifest.json"), "wb") as file:
        file.write(document if isinstance(document, bytes) else json.dumps(document).encode())
    with open(os.path.join(folder, "case.json"), "w") as file:
        json.dump({"expect": expect, "say": list(say)}, file)


busybox = tar(entry("bin/", tarfile.DIRTYPE), entry("bin/busybox", data=BUSYBOX),
              entry("bin/sh", tarfile.SYMTYPE, link="busybox"), entry("bin/cat", tarfile.SYMTYPE, link="busybox"),
              entry("bin/ls", tarfile.SYMTYPE, link="busybox"), entry("bin/sleep", tarfile.SYMTYPE, link="busybox"))
COUNT = 0


def plain():
    """A harmless layer that no other case has: a layer that is there already is not fetched again."""
    global COUNT
    COUNT += 1
    return tar(entry("file", data=b"data of layer %d" % COUNT))


# What is served is not what was promised.
case("wrong-digest", [plain()], blobs={0: gzip.compress(b"other" * 100, mtime=0)}, say=["digest"])
case("truncated-blob", [plain() + b"\0" * 100000], blobs={0: gzip.compress(b"x" * 10000)[:20]})
case("wrong-size", [plain()], sizes={0: 7}, say=["size"])
case("wrong-diffid", [plain()], diff_ids=["sha256:" + "0" * 64], say=["diffID"])
case("too-few-diffids", [plain(), plain()], diff_ids=[digest(b"one")])
case("not-gzip", [plain()], blobs={0: b"this is no gzip stream at all"}, say=[])
case("unknown-compression", [plain()], media={0: LAYER + "+brotli"}, say=["brotli"])
case("manifest-is-not-json", [plain()], manifest=b"{\"schemaVersion\": 2, ")
case("manifest-of-nothing", [plain()], manifest={})
case("negative-size", [plain()], sizes={0: -1})
case("enormous-size", [plain()], sizes={0: 1 << 62})

# The tar lies.
case("climbs-out", [tar(entry("../../../../tmp/hull-e2e-escaped", data=b"out"))], say=[".."])
case("climbs-out-inside", [tar(entry("a/../../hull-e2e-escaped", data=b"out"))], say=[".."])
case("hard-link-to-nowhere", [tar(entry("link", tarfile.LNKTYPE, link="no/such/file"))], say=["no/such/file"])
case("hard-link-climbs-out", [tar(entry("link", tarfile.LNKTYPE, link="../../etc/shadow"))])
case("truncated-tar", [entry("file", data=b"x" * 2000)[:1500]])
case("size-not-a-number", [raw_header(b"file", b"zzzzzzzzzzz\0") + b"\0" * 1024])
case("size-enormous", [raw_header(b"file", b"\x80\0\0\0\x7f" + b"\xff" * 7) + b"\0" * 1024])
case("bad-checksum", [raw_header(b"file", b"00000000000\0").replace(b"file", b"evil") + b"\0" * 1024])
case("nul-in-pax-path", [tar(entry("x", pax={"path": "a\0b"}))])
case("name-too-long", [tar(entry("x" * 300, data=b""))])
case("path-too-long", [tar(entry("/".join(["d" * 200] * 40), data=b""))])
case("endless-pax-header", [raw_header(b"pax", b"77777777777\0", b"x") + b"\0" * 4096])

# Well-formed, and meant to do harm when it is run: must be contained.
case("symlinked-proc", [busybox, tar(entry("proc", tarfile.SYMTYPE, link="/bin"))], "contained")
case("symlinked-dev", [busybox, tar(entry("dev", tarfile.SYMTYPE, link="/../../../../dev"))], "contained")
case("symlinked-etc", [busybox, tar(entry("etc", tarfile.SYMTYPE, link="/../../../../../etc"))], "contained")
case("absolute-names", [busybox, tar(entry("/absolute", data=b"inside"))], "contained")
case("device-node", [busybox, tar(entry("disk", tarfile.BLKTYPE, device=(8, 0)), entry("mem", tarfile.CHRTYPE, device=(1, 1)))], "contained")
case("symlink-parent", [busybox, tar(entry("way", tarfile.SYMTYPE, link="/tmp"), entry("way/hull-e2e-escaped", data=b"out"))], "contained")
case("volume-label", [busybox], "contained", config={"Volumes": {"/../../../etc": {}}, "Labels": {"run": "$(touch /tmp/hull-e2e-escaped)"}})
case("working-directory", [busybox, tar(entry("cwd", tarfile.SYMTYPE, link="/proc/self/fd"))], "contained", config={"WorkingDir": "/cwd/7"})
case("newline-home", [busybox, tar(entry("etc/", tarfile.DIRTYPE), entry("etc/passwd", data=b"root:x:0:0:root:/root:/bin/sh\n"))],
     "contained", config={"Env": ["PATH=/bin", "HOME=/root\nevil:x:0:0::/:/bin/sh"]})
