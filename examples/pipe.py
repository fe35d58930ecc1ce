"""Reads messages from a pipe, with nothing but Python.

    tramline consume --stream NAME --app NAME --output stdout --format json | python3 pipe.py places.json

The worker goes on where it was. After a crash of it some lines come again, which their place tells: the last
one of each shard is kept in a file. Ctrl-C stops the worker, which ends the pipe, and what is in it is still
dealt with. If this program is killed, what was in the pipe is lost; reader.py is for where that matters.
"""

import json
import os
import signal
import sys


def main(path):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the worker.
    places = {}
    if os.path.exists(path):
        with open(path) as file:
            places = json.load(file)
    for line in sys.stdin.buffer:
        if not line.endswith(b"\n"):
            break  # The worker was killed while it wrote: the line comes again.
        message = json.loads(line)
        shard = message["stream"] + " " + message["shard"]
        # A sequence number is too long for most numbers of JSON, so it comes as a text.
        place = [int(message["sequence_number"]), message["sub_sequence_number"]]
        if place <= places.get(shard, []):
            continue  # It came before.
        print(message["event"]["data"]["raw"], flush=True)  # What your service does.
        places[shard] = place
        with open(path + ".new", "w") as file:
            json.dump(places, file)
        os.replace(path + ".new", path)


try:
    main(*sys.argv[1:])
except BrokenPipeError:  # Whoever read what is printed has gone, as `head` does.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
