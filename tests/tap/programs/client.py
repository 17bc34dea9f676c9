# SPDX-License-Identifier: Apache-2.0
"""client.py ADDRESS PORT: one connection, and a request for each line of its input.

"GET PATH" and "POST PATH SIZE" print the SHA-256 of the answer's body; "close" closes
the connection and prints "closed".
"""

from __future__ import annotations

import hashlib
import http.client
import sys


def main() -> None:
    """Requests."""
    address, port = sys.argv[1:]
    connection = http.client.HTTPConnection(address, int(port))
    for line in sys.stdin:
        words = line.split()
        if words == ["close"]:
            connection.close()
            print("closed", flush=True)
            continue
        content = b"posted!" * int(words[2]) if words[0] == "POST" else None
        connection.request(words[0], words[1], body=content)
        answer = connection.getresponse().read()
        print(hashlib.sha256(answer).hexdigest(), flush=True)


main()
