"""The client of the relay: connections to workers are kept, and never given out twice."""

from __future__ import annotations

from protocol.events import SSE_MEDIA_TYPE
from tests.cluster.conftest import PATH, Cluster, Running
from transport.client import HttpPool, Upstream

BODY = b'{"model": "echo", "prompt": "hello"}'


async def asked(pool: HttpPool, worker: Running) -> Upstream:
    """A stream read up to its terminal event, as the relay reads it, and no further."""
    accept = ((b"accept", SSE_MEDIA_TYPE.encode()),)
    upstream = await pool.open(worker.address, PATH, BODY, accept, timeout_s=10)
    data = b""
    while b"event: finished" not in data:
        data += await upstream.read(10)
    return upstream


async def test_a_connection_outlives_its_stream(cluster: Cluster) -> None:
    """Tokens come apart, so the last event and the end of the body must come together."""
    worker = await cluster.worker(delay_s=0.005)
    pool = HttpPool()
    first = await asked(pool, worker)
    first.close()
    for _ in range(3):
        again = await asked(pool, worker)
        assert again is first
        again.close()
    pool.close()


async def test_a_connection_closed_twice_is_given_out_once(cluster: Cluster) -> None:
    worker = await cluster.worker()
    pool = HttpPool()
    first = await asked(pool, worker)
    first.close()
    first.close()
    one, other = await asked(pool, worker), await asked(pool, worker)
    assert one is not other
    one.close()
    other.close()
    pool.close()


async def test_a_stream_left_early_is_not_given_out_again(cluster: Cluster) -> None:
    worker = await cluster.worker(delay_s=0.05)
    pool = HttpPool()
    left = await pool.open(worker.address, PATH, BODY, timeout_s=10)
    await left.read(10)
    left.close()
    other = await asked(pool, worker)
    assert other is not left
    other.close()
    pool.close()
