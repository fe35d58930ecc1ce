#!/bin/sh
# Appends the messages of a feed to a file, and says what it has finished (docs/feeds.md):
#
#     tramline consume --stream NAME --app NAME --acks --output "exec:sh reader.sh messages.log"
set -eu

read -r _ # The first line of the feed.
echo '{"tramline":1}'
serial=0
while IFS= read -r line; do
    case $line in '{"error"'*) echo "$line" >&2 && exit 1 ;; esac
    printf '%s\n' "$line" >>"$1" # What your service does.
    serial=$((serial + 1))       # Serial numbers count from 1.
    echo "{\"ack\":$serial}"     # Only now it is finished.
done
