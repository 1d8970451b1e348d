"""Answers per second of `ask_all` against a server that takes 50 ms, beside the `openai` client; and what one slow answer costs.

Run by hand: python benchmarks/endpoint.py. The server is another process and answers as many at once as it is asked. The
client `openai` is measured where it can be imported, with as many threads and nothing around it: no schema, no cache, no ledger.
The time of the processor is that of the client's process; on a machine that is shared it says more than the clock.
"""

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nemotron_nb.endpoint import Answer, Endpoint, Request, Usage, ask_all, ask_each

QUESTIONS, DELAY, REPEATS = 1500, 0.05, 3
AT_ONCE = (8, 64, 256)
SAID = json.dumps(
    {
        "id": "1", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6},
    }
).encode()  # fmt: skip


async def answer(reader, writer):
    """Answer the requests of one connection; a question that is a number is answered after so many seconds."""
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            fields = dict(line.split(b": ", 1) for line in head.lower().split(b"\r\n")[1:] if b": " in line)
            body = json.loads(await reader.readexactly(int(fields[b"content-length"])))
            await asyncio.sleep(float(body["messages"][0]["content"].split()[0]))
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(SAID), SAID)
            )
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def serve():
    """Serve until the process is ended; the address is printed first."""
    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=1024)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await server.serve_forever()


def questions(delays):
    return [Request([{"role": "user", "content": f"{delay} {i}"}]) for i, delay in enumerate(delays)]


def seconds_of(act):
    """(seconds of the clock, of the processor)."""
    begun = time.perf_counter(), time.process_time()
    act()
    return time.perf_counter() - begun[0], time.process_time() - begun[1]


def ours(url, at_once, asked, usage=None, act=ask_all):
    """Seconds for all answers."""
    endpoint, found = Endpoint(url, "m", concurrency=at_once, options={}), []
    seconds = seconds_of(lambda: found.extend(act(endpoint, asked, usage)))
    assert len(found) == len(asked) and all(isinstance(a, Answer) for a in found if not isinstance(a, tuple))
    return seconds


def theirs(url, at_once, asked):
    """The same by the client of OpenAI; None where it is not installed."""
    try:
        from openai import OpenAI
    except ImportError:
        return None
    with OpenAI(base_url=url, api_key="x") as client, ThreadPoolExecutor(at_once) as pool:
        ask = lambda r: client.chat.completions.create(model="m", messages=r.messages)  # noqa: E731
        return seconds_of(lambda: list(pool.map(ask, asked)))


def median(act):
    """Medians of the repeats, clock and processor; None where nothing is measured."""
    found = [act() for _ in range(REPEATS)]
    return None if None in found else tuple(statistics.median(column) for column in zip(*found, strict=True))


def shown(name, count, seconds):
    """Answers per second and what each takes of the processor, in words."""
    return f"{name} {count / seconds[0]:6,.0f}/s, {1e6 * seconds[1] / count:4.0f} us each" if seconds else f"{name} is not installed"


def throughput(url):
    """Answers per second, side by side."""
    for at_once in AT_ONCE:
        asked = questions([DELAY] * min(QUESTIONS, 40 * at_once))
        count = len(asked)
        with tempfile.TemporaryDirectory() as folder:
            plain = median(lambda at_once=at_once, asked=asked: ours(url, at_once, asked))
            noted = median(
                lambda at_once=at_once, asked=asked: ours(url, at_once, asked, Usage(Path(folder) / "ledger.jsonl"))
            )
        other = median(lambda at_once=at_once, asked=asked: theirs(url, at_once, asked))
        print(
            f"{at_once:4} at once, no more than {at_once / DELAY:6,.0f}/s: {shown('ask_all', count, plain)}; "
            f"{shown('with a ledger', count, noted)}; {shown('openai', count, other)}"
            + (f"; ratio {other[0] / plain[0]:.1f}, of the processor {other[1] / plain[1]:.1f}" if other else ""),
            flush=True,
        )


def straggler(url):
    """One answer of 2 s among 400 of 10 ms."""
    asked = questions([2.0] + [0.01] * 399)
    ideal = max(2.0, (2.0 + 399 * 0.01) / 8)
    for name, act in (("in order", ask_all), ("as they come", ask_each)):
        seconds, _ = median(lambda act=act: ours(url, 8, asked, None, act))
        print(f"one of 400 takes 2 s, 8 at once, {name}: {seconds:.2f} s, {100 * (seconds / ideal - 1):.1f} % over the ideal {ideal:.2f} s")


def main():
    if "serve" in sys.argv:
        asyncio.run(serve())
        return
    server = subprocess.Popen([sys.executable, __file__, "serve"], stdout=subprocess.PIPE, text=True)
    try:
        url = server.stdout.readline().strip()
        throughput(url)
        straggler(url)
    finally:
        server.kill()


if __name__ == "__main__":
    main()
