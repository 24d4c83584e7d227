"""A server that reads requests and does nothing with them: what the traffic of an attack costs by itself.

    python -m benchmarks.attack_sink SECONDS

It prints its port and runs until standard input closes. Each request is answered SECONDS after its connection began,
or later where the body takes longer, so that the traffic is as dense as a real server has it.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys

MAX_HEAD = 65_536  # bytes, as `mixmim serve` takes
PIECE = 262_144  # bytes read at once
ANSWER = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


async def drop(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float) -> None:
    """Read one request and drop it, wait until it has taken so many seconds, answer, hang up."""
    ends = asyncio.get_running_loop().time() + seconds
    with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"\r\ncontent-length: (\d+)", head)
        left = int(length[1]) if length else 0
        while left > 0 and (piece := await reader.read(min(left, PIECE))):
            left -= len(piece)
        await asyncio.sleep(ends - asyncio.get_running_loop().time())
        writer.write(ANSWER)
        await writer.drain()
    writer.close()


async def main() -> None:
    """Serve until standard input closes."""
    seconds = float(sys.argv[1])
    server = await asyncio.start_server(
        lambda reader, writer: drop(reader, writer, seconds), "127.0.0.1", 0, limit=MAX_HEAD
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
