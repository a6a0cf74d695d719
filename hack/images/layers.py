#!/usr/bin/env python3
"""layers.py DIRECTORY LAYERS FILES MIB NOISE: tar files for an image, the same at each call.

FILES files of MIB MiB together, spread over LAYERS layers; NOISE percent of the bytes do not compress, the rest is text.
"""
import io
import random
import sys
import tarfile

directory, (layers, files, mib, noise) = sys.argv[1], map(int, sys.argv[2:])
random.seed(layers * files)
TEXT = b"lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor incididunt\n" * 4096
BLOCK = 64 << 10

for layer in range(layers):
    count = files // layers
    # Many small files and a few large ones, as in real layers.
    weights = [min(random.paretovariate(0.8), 3000.0) for _ in range(count)]
    budget = (mib << 20) / layers / sum(weights)
    with tarfile.open(f"{directory}/{layer:03}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, weight in enumerate(weights):
            size, content = int(weight * budget), io.BytesIO()
            for start in range(0, size, BLOCK):
                part = min(BLOCK, size - start)
                content.write(random.randbytes(part * noise // 100))
                content.write(TEXT[: part - part * noise // 100])
            entry = tarfile.TarInfo(f"layer{layer}/{number % 100:02}/file{number}")
            entry.size, entry.mtime = size, 1_700_000_000
            content.seek(0)
            archive.addfile(entry, content)
