"""Reads a feed of `tramline consume --acks` and says what it has finished (docs/feeds.md).

    python3 reader.py unix:/run/ocs.sock green     the name, where the feed has --readers or --share
    python3 reader.py tcp:127.0.0.1:7001
"""

import json
import socket
import sys


def connect(place):
    kind, _, address = place.partition(":")
    if kind == "unix":
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(address)
        return connection
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)))


def main(place, name=""):
    connection = connect(place)

    def say(what):
        connection.sendall(json.dumps(what).encode() + b"\n")

    say({"tramline": 1, "reader": name})
    for line in connection.makefile("rb"):
        message = json.loads(line)
        if "error" in message:
            sys.exit(message["error"])
        if "serial" in message:  # Not the first line of the feed, nor what later versions may say.
            print(message["event"]["data"]["raw"], flush=True)  # What your service does.
            say({"ack": message["serial"]})  # Only now it is finished.


main(*sys.argv[1:])
