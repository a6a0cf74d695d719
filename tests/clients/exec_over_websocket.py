"""exec_over_websocket.py URL PROTOCOL MEGABYTES [AUTHORITY]

Runs the command behind the URL of an Exec through Debian's python3-websocket: sends so many megabytes to its standard
input, prints what came on each channel (a digest if it is long) as JSON. With TLS only AUTHORITY is trusted, a file.
"""
import hashlib
import json
import select
import socket as sockets
import ssl
import sys
import threading
import urllib.parse

import websocket

PIECE = 1 << 16


def carry(secure, plain):
    """Carries bytes between the two until both have ended. In one thread: Python's TLS connections are not made for one
    that writes while another reads."""
    to_server, to_client, open_ends = b"", b"", {secure, plain}
    secure.setblocking(False)
    plain.setblocking(False)

    def take(end):
        try:
            data = end.recv(PIECE)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError):
            return b""
        if not data:
            open_ends.discard(end)
        return data

    def give(end, data):
        try:
            return data[end.send(data):]
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError):
            return data

    while secure in open_ends or to_client:
        reads = [end for end, waiting in ((secure, to_client), (plain, to_server)) if end in open_ends and not waiting]
        writes = [end for end, waiting in ((secure, to_server), (plain, to_client)) if waiting]
        ready = secure in reads and secure.pending()
        readable, _, _ = select.select(reads, writes, [], 0 if ready else 120)
        to_server, to_client = to_server and give(secure, to_server), to_client and give(plain, to_client)
        if ready or secure in readable:
            to_client = take(secure)
        if plain in readable:
            to_server = take(plain)
    plain.close()


def over_tls(url, authority):
    """A plain connection behind which is the server, if the authority vouches for it."""
    server = urllib.parse.urlsplit(url)
    context = ssl.create_default_context(cafile=authority)
    secure = context.wrap_socket(
        sockets.create_connection((server.hostname, server.port), timeout=120), server_hostname=server.hostname)
    ours, theirs = sockets.socketpair()
    threading.Thread(target=carry, args=(secure, theirs), daemon=True).start()
    return ours


url, protocol, megabytes = sys.argv[1], sys.argv[2], int(sys.argv[3])
below = over_tls(url, sys.argv[4]) if len(sys.argv) > 4 else None
url = "ws" + url.removeprefix("https" if below else "http")
socket = websocket.create_connection(url, subprotocols=[protocol], timeout=120, socket=below)
assert socket.subprotocol == protocol, socket.subprotocol
block = bytes(range(256)) * 128
digest = hashlib.sha256()


def send():
    for _ in range(megabytes * 32):
        digest.update(block)
        socket.send_binary(b"\0" + block)
    if protocol.startswith("v5"):
        socket.send_binary(b"\xff\0")


sender = threading.Thread(target=send)
sender.start()
channels = {}
while True:
    opcode, message = socket.recv_data()
    if opcode == websocket.ABNF.OPCODE_CLOSE:
        break
    if message:
        channels.setdefault(message[0], bytearray()).extend(message[1:])
sender.join()


def shown(data):
    return data.decode() if len(data) < 4096 else "sha256:" + hashlib.sha256(data).hexdigest()


print(json.dumps({"sent": "sha256:" + digest.hexdigest(), **{str(n): shown(d) for n, d in channels.items()}}))
