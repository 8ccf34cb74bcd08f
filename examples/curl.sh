#!/bin/sh
# Ask `pascalvl serve` about a picture, and print the answer as it is written: examples/curl.sh PICTURE [QUESTION]
# The server is at OPENAI_BASE_URL, its key, if it has one, in OPENAI_API_KEY. The picture goes through a pipe, as it is
# too large for an argument; the question must not have quotes or backslashes in it.
set -eu
url=${OPENAI_BASE_URL:-http://127.0.0.1:8000/v1}
{
    printf '{"stream": true, "messages": [{"role": "user", "content": [{"type": "text", "text": "%s"}, ' \
        "${2:-Describe the picture.}"
    printf '{"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,'
    base64 -w 0 "$1"
    printf '"}}]}]}'
} | curl -sSN --fail-with-body "$url/chat/completions" --data-binary @- \
    -H 'Content-Type: application/json' -H "Authorization: Bearer ${OPENAI_API_KEY:-none}"
