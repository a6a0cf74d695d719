"""exec_over_websocket.py URL PROTOCOL MEGABYTES [AUTHORITY]

Runs the command behind the URL of an Exec through Debian's python3-websocket: sends so many megabytes to its standard
input, prints what came on each channel (a digest if it is long) as JSON. With TLS only AUTHORITY is trusted, a file.
"""
import hashlib
import json
import sys
import threading

import websocket

url, protocol, megabytes = sys.argv[1], sys.argv[2], int(sys.argv[3])
trust = {"ca_certs": sys.argv[4]} if len(sys.argv) > 4 else None
socket = websocket.create_connection("ws" + url.removeprefix("http"), subprotocols=[protocol], timeout=120, sslopt=trust)
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
