"""The WebSocket server and client of tests/lab/ingress, by Debian's python3-websockets.

websocket.py serve        says on port 8765 what it was told
websocket.py URL CA-FILE  tries the server at URL
"""

import asyncio
import ssl
import sys

import websockets


async def serve():
    async def echo(socket):
        async for message in socket:
            if message == "leave":
                return await socket.close(4001, "as you wish")
            await socket.send(f"you said {message}" if isinstance(message, str) else message[::-1])

    async with websockets.serve(echo, None, 8765, max_size=1 << 20):
        await asyncio.Future()


async def converse(url, authority):
    trust = ssl.create_default_context(cafile=authority)
    async with websockets.connect(url, ssl=trust, max_size=1 << 20) as socket:
        await socket.send("hello")
        assert await socket.recv() == "you said hello"
        large = bytes(range(250)) * 800
        await socket.send(large)
        assert await socket.recv() == large[::-1]
        await asyncio.wait_for(await socket.ping(), 5)
    assert socket.close_code == 1000, socket.close_code
    async with websockets.connect(url, ssl=trust) as socket:
        await socket.send("leave")
        try:
            await socket.recv()
        except websockets.ConnectionClosed as closed:
            assert (closed.rcvd.code, closed.rcvd.reason) == (4001, "as you wish"), closed


asyncio.run(serve() if sys.argv[1] == "serve" else converse(*sys.argv[1:3]))
