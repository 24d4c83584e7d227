"""The batcher with a small engine of known answers: what shares a batch, and who gets which result."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mixmim_serve.engines.base import Arrays
from mixmim_serve.errors import EngineError
from mixmim_serve.service import batcher as batcher_module
from mixmim_serve.service.batcher import (
    FEW,
    RETURN_SHARE,
    SHARED_WAIT,
    Batcher,
    BatchResult,
    PendingDecodes,
    RecentClients,
)

PATIENCE = 20  # seconds until a test that would hang fails
FACTORS = {"double": 2, "triple": 3}  # outputs of the engine, as multiples of its input


class Multiplier:
    """Multiplies its inputs, and keeps every batch it saw; the first run waits until `release` is set."""

    name = "multiplier"
    max_batch: int | None = None

    def __init__(self, *, sizes: Sequence[int] = (), poison: Sequence[int] = (), miscount: int = 0) -> None:
        self.sizes, self.poison, self.miscount = sizes, poison, miscount
        self.batches: list[list[int]] = []
        self.asked: list[list[str]] = []
        self.started, self.release = threading.Event(), threading.Event()

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        values = inputs["pixels"][:, 0].astype(int).tolist()
        if self.sizes:  # here, so that no request succeeds unless it truly shared its batch
            assert len(values) == self.sizes[len(self.batches)]
        self.batches.append(values)
        self.asked.append(list(outputs))
        self.started.set()
        assert self.release.wait(PATIENCE)
        assert graph == "encoder"
        if bad := sorted(set(values) & set(self.poison)):
            raise ValueError(f"cannot take {bad}")
        rows = np.resize(inputs["pixels"], (len(values) + self.miscount, 3))
        return {name: rows * FACTORS[name] for name in outputs}


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


def pixels(value: int) -> dict[str, NDArray[Any]]:
    return {"pixels": np.full(3, value, np.float32)}


def finish(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, PATIENCE))


async def behind_another(
    batcher: Batcher,
    engine: Multiplier,
    requests: Sequence[tuple[int, Sequence[str]]],
    meanwhile: Callable[[list[asyncio.Task[BatchResult]]], None] = lambda _: None,
) -> list[Arrays | BaseException]:
    """Results of requests that all waited while the engine ran another one, the value 0."""
    first = asyncio.create_task(batcher.run(pixels(0), ["double"]))
    assert await asyncio.to_thread(engine.started.wait, PATIENCE)
    tasks = [asyncio.create_task(batcher.run(pixels(value), outputs)) for value, outputs in requests]
    await asyncio.sleep(0)  # each runs up to its place in the queue
    assert batcher.queued == len(requests)
    meanwhile(tasks)
    engine.release.set()
    results = await asyncio.gather(first, *tasks, return_exceptions=True)
    assert results[0].outputs["double"].tolist() == [0, 0, 0]
    return [result.outputs if isinstance(result, BatchResult) else result for result in results[1:]]


def test_requests_that_wait_share_a_batch_and_get_their_own_row(thread: ThreadPoolExecutor) -> None:
    engine = Multiplier(sizes=[1, 5])
    batcher = Batcher(engine, "encoder", thread)
    results = finish(behind_another(batcher, engine, [(value, ["double"]) for value in (1, 2, 3, 4, 5)]))
    assert [result["double"].tolist() for result in results] == [[2 * value] * 3 for value in (1, 2, 3, 4, 5)]
    assert engine.batches == [[0], [1, 2, 3, 4, 5]]


def test_the_queue_drains_greedily_up_to_the_largest_batch(thread: ThreadPoolExecutor) -> None:
    engine = Multiplier(sizes=[1, 4, 4, 2])
    batcher = Batcher(engine, "encoder", thread, max_batch=4)
    results = finish(behind_another(batcher, engine, [(value, ["double"]) for value in range(1, 11)]))
    assert [result["double"][0] for result in results] == [2 * value for value in range(1, 11)]
    assert engine.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]  # first come, first served


def test_a_lone_request_does_not_wait_for_company(thread: ThreadPoolExecutor) -> None:
    engine = Multiplier(sizes=[1, 1])
    engine.release.set()
    batcher = Batcher(engine, "encoder", thread)

    async def one_by_one() -> list[float]:
        return [(await batcher.run(pixels(value), ["triple"])).outputs["triple"][0] for value in (7, 8)]

    assert finish(one_by_one()) == [21, 24]


def test_a_batch_runs_the_union_of_outputs_and_each_gets_its_choice(thread: ThreadPoolExecutor) -> None:
    engine = Multiplier(sizes=[1, 3])
    batcher = Batcher(engine, "encoder", thread)
    requests = [(1, ["double"]), (2, ["triple"]), (3, ["triple", "double"])]
    one, two, three = finish(behind_another(batcher, engine, requests))
    assert engine.asked == [["double"], ["double", "triple"]]
    assert {name: array[0] for name, array in one.items()} == {"double": 2}
    assert {name: array[0] for name, array in two.items()} == {"triple": 6}
    assert {name: array[0] for name, array in three.items()} == {"triple": 9, "double": 6}


@pytest.mark.parametrize("poison", [[1], [5], [8], [2, 3], [1, 2, 3, 4, 5, 6, 7, 8]])
def test_a_poisoned_item_fails_alone(thread: ThreadPoolExecutor, poison: list[int]) -> None:
    engine = Multiplier(poison=poison)
    batcher = Batcher(engine, "encoder", thread)
    results = finish(behind_another(batcher, engine, [(value, ["double"]) for value in range(1, 9)]))
    assert engine.batches[1] == [1, 2, 3, 4, 5, 6, 7, 8]
    for value, result in enumerate(results, start=1):
        if value in poison:
            assert isinstance(result, ValueError)
            assert str(result) == f"cannot take [{value}]"  # its own failure, not that of the batch
        else:
            assert result["double"].tolist() == [2 * value] * 3


def test_the_batcher_works_on_after_a_failure(thread: ThreadPoolExecutor) -> None:
    engine = Multiplier(poison=[1])
    engine.release.set()
    batcher = Batcher(engine, "encoder", thread)

    async def fail_then_succeed() -> float:
        with pytest.raises(ValueError, match="cannot take"):
            await batcher.run(pixels(1), ["double"])
        return (await batcher.run(pixels(2), ["double"])).outputs["double"][0]

    assert finish(fail_then_succeed()) == 4


@pytest.mark.parametrize("miscount", [-1, 1])
def test_another_number_of_results_is_an_error_and_no_answer(thread: ThreadPoolExecutor, miscount: int) -> None:
    engine = Multiplier(miscount=miscount)
    engine.release.set()
    batcher = Batcher(engine, "encoder", thread)

    async def together() -> list[Arrays | BaseException]:
        requests = [batcher.run(pixels(value), ["double"]) for value in (1, 2, 3)]
        return await asyncio.gather(*requests, return_exceptions=True)

    results = finish(together())
    assert [type(result) for result in results] == [EngineError] * 3
    assert "results for 1 inputs" in str(results[0])
    assert engine.batches[0] == [1, 2, 3]


def test_cancelled_requests_never_reach_the_engine(thread: ThreadPoolExecutor) -> None:
    engine = Multiplier(sizes=[1, 2])
    batcher = Batcher(engine, "encoder", thread)

    def leave(tasks: list[asyncio.Task[BatchResult]]) -> None:
        tasks[0].cancel()
        tasks[2].cancel()

    results = finish(behind_another(batcher, engine, [(value, ["double"]) for value in (1, 2, 3, 4)], leave))
    assert engine.batches == [[0], [2, 4]]
    assert [type(results[0]), type(results[2])] == [asyncio.CancelledError] * 2
    assert [results[1]["double"][0], results[3]["double"][0]] == [4, 8]


def test_a_queue_of_cancelled_requests_runs_nothing(thread: ThreadPoolExecutor) -> None:
    engine = Multiplier(sizes=[1])
    batcher = Batcher(engine, "encoder", thread)

    def leave(tasks: list[asyncio.Task[BatchResult]]) -> None:
        for task in tasks:
            task.cancel()

    finish(behind_another(batcher, engine, [(1, ["double"]), (2, ["double"])], leave))
    assert engine.batches == [[0]]
    assert not batcher.queued


def test_a_full_batch_is_put_together_while_the_engine_is_busy(thread: ThreadPoolExecutor) -> None:
    engine = Multiplier(sizes=[1, 2, 2])
    batcher = Batcher(engine, "encoder", thread, max_batch=2)
    prepared = []

    def look(_: list[asyncio.Task[BatchResult]]) -> None:
        prepared.append([int(item.inputs["pixels"][0]) for item in batcher.next_batch])

    finish(behind_another(batcher, engine, [(value, ["double"]) for value in (1, 2, 3, 4)], look))
    assert prepared == [[1, 2]]
    assert engine.batches == [[0], [1, 2], [3, 4]]


def test_who_leaves_a_prepared_batch_does_not_reach_the_engine(thread: ThreadPoolExecutor) -> None:
    engine = Multiplier(sizes=[1, 1, 1])
    batcher = Batcher(engine, "encoder", thread, max_batch=2)
    results = finish(
        behind_another(batcher, engine, [(value, ["double"]) for value in (1, 2, 3)], lambda tasks: tasks[0].cancel())
    )
    assert engine.batches == [[0], [2], [3]]
    assert [result["double"][0] for result in results[1:]] == [4, 6]


def test_an_urgent_item_goes_first_and_all_are_told_their_times(thread: ThreadPoolExecutor) -> None:
    engine = Multiplier()
    observed = []
    batcher = Batcher(engine, "encoder", thread, 1, lambda size, seconds: observed.append((size, seconds)))

    async def urgent_last() -> list[BatchResult]:
        first = asyncio.create_task(batcher.run(pixels(0), ["double"]))
        assert await asyncio.to_thread(engine.started.wait, PATIENCE)
        batcher.max_batch = 4  # so that nothing is prepared yet
        others = [asyncio.create_task(batcher.run(pixels(value), ["double"])) for value in (1, 2)]
        others.append(asyncio.create_task(batcher.run(pixels(3), ["double"], urgent=True)))
        await asyncio.sleep(0)
        engine.release.set()
        return await asyncio.gather(first, *others)

    ran = finish(urgent_last())
    assert engine.batches == [[0], [3, 1, 2]]
    assert [size for size, _ in observed] == [1, 3]
    assert min(ran[0].infer, ran[1].queue) > 0
    assert ran[1].infer == observed[1][1]


@pytest.mark.parametrize(
    ("least", "last", "most", "batches"),
    [
        (PATIENCE, 0.0, PATIENCE, [[1, 2]]),
        (0.0, 0.0, PATIENCE, [[1], [2]]),
        (0.01, 0.0, PATIENCE, [[1], [2]]),
        (0.01, PATIENCE, PATIENCE, [[1, 2]]),  # as long as the last batch
        (0.01, PATIENCE, 0.02, [[1], [2]]),
    ],
)
def test_an_engine_on_the_same_cores_waits_for_what_is_being_decoded(
    thread: ThreadPoolExecutor, least: float, last: float, most: float, batches: list[list[int]]
) -> None:
    engine = Multiplier()
    engine.release.set()
    pending = PendingDecodes(least, most)
    pending.last_batch = last
    batcher = Batcher(engine, "encoder", thread, pending_decodes=pending)

    async def decoded_later() -> None:
        with pending.decoding(""):
            await asyncio.sleep(0.1)
        await batcher.run(pixels(2), ["double"])

    async def both() -> None:
        await asyncio.gather(decoded_later(), batcher.run(pixels(1), ["double"]))

    finish(both())
    assert engine.batches == batches
    assert 0 < pending.last_batch != last  # of its own last batch


def test_a_full_batch_and_an_image_that_is_refused_are_not_waited_for(thread: ThreadPoolExecutor) -> None:
    engine = Multiplier()
    engine.release.set()
    pending = PendingDecodes(10 * PATIENCE, 10 * PATIENCE)
    batcher = Batcher(engine, "encoder", thread, max_batch=2, pending_decodes=pending)

    async def all_of_them() -> None:
        with pending.decoding(""):  # for ever, as far as these two can see
            await asyncio.gather(*(batcher.run(pixels(value), ["double"]) for value in (1, 2)))
        job = asyncio.create_task(batcher.run(pixels(3), ["double"]))
        with pending.decoding(""):  # refused: it leaves and does not join
            await asyncio.sleep(0)
        await job

    finish(all_of_them())
    assert engine.batches == [[1, 2], [3]]


def test_after_a_batch_the_next_one_waits_for_its_clients_to_come_back(thread: ThreadPoolExecutor) -> None:
    """Without it, four clients and one stay two groups for ever, each computed beside the decoding of the other."""
    engine = Multiplier()
    engine.release.set()
    pending = PendingDecodes(10 * PATIENCE, 10 * PATIENCE)
    batcher = Batcher(engine, "encoder", thread, pending_decodes=pending)
    pending.note_batch(0.2 / RETURN_SHARE, FEW)

    async def comes_back(value: int) -> None:
        await asyncio.sleep(0.02)
        with pending.decoding(""):
            await asyncio.sleep(0.02)
        await batcher.run(pixels(value), ["double"])

    async def both() -> None:
        await asyncio.gather(batcher.run(pixels(1), ["double"]), comes_back(2))

    finish(both())
    assert engine.batches == [[1, 2]]
    pending.note_batch(0.2 / RETURN_SHARE, FEW - 1)
    assert not pending.return_wait  # of few images: one that is sent after another does not wait


def test_a_batch_of_several_clients_waits_a_short_time(thread: ThreadPoolExecutor) -> None:
    engine = Multiplier()
    engine.release.set()
    pending = PendingDecodes(1000 * SHARED_WAIT, 1000 * SHARED_WAIT)
    batcher = Batcher(engine, "encoder", thread, pending_decodes=pending)

    async def beside_a_slow_decode() -> None:
        with pending.decoding("a"):
            await asyncio.gather(*submit(batcher, "b", [1]), *submit(batcher, "c", [2]))

    began = time.monotonic()
    finish(beside_a_slow_decode())
    assert sorted(value for batch in engine.batches for value in batch) == [1, 2]
    assert time.monotonic() - began < 500 * SHARED_WAIT


def submit(batcher: Batcher, client: str, values: Sequence[int]) -> list[asyncio.Task[BatchResult]]:
    """One request of a client with an image for each value."""
    return [
        asyncio.create_task(batcher.run(pixels(value), ["double"], client=client, request=client)) for value in values
    ]


def test_many_images_of_one_client_do_not_hold_up_another(
    thread: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batcher_module, "SHARED_SECONDS", 0.0)
    engine = Multiplier()
    batcher = Batcher(engine, "encoder", thread)

    async def all_of_them() -> None:
        tasks = submit(batcher, "a", [0])
        assert await asyncio.to_thread(engine.started.wait, PATIENCE)
        tasks += submit(batcher, "a", range(1, 41))
        await asyncio.sleep(0)
        assert batcher.next_batch == []  # once stacked, nobody could join it
        tasks += submit(batcher, "b", [100])
        await asyncio.sleep(0)
        engine.release.set()
        await asyncio.gather(*tasks)

    batcher.recent_clients.add("b")
    finish(all_of_them())
    assert sorted(engine.batches[1]) == [1, 100]
    assert set(map(len, engine.batches[2:])) == {1}


def test_images_of_many_clients_share_a_batch(thread: ThreadPoolExecutor) -> None:
    engine = Multiplier()
    batcher = Batcher(engine, "encoder", thread)

    async def all_of_them() -> None:
        tasks = submit(batcher, "0", [0])
        assert await asyncio.to_thread(engine.started.wait, PATIENCE)
        for value in range(1, 31):
            tasks += submit(batcher, str(value), [value])
        await asyncio.sleep(0)
        engine.release.set()
        await asyncio.gather(*tasks)

    finish(all_of_them())
    assert list(map(len, engine.batches)) == [1, 30]


def test_the_engine_waits_for_no_pile_of_another_client() -> None:
    pending = PendingDecodes()
    with contextlib.ExitStack() as stack:
        assert not pending.is_worth_waiting(["a"])
        stack.enter_context(pending.decoding("b"))
        assert pending.is_worth_waiting(["a"])
        for _ in range(4):
            stack.enter_context(pending.decoding("b"))
        assert not pending.is_worth_waiting(["a"])
        assert not pending.is_worth_waiting(["a", "b"])
        assert pending.is_worth_waiting(["b"])
    assert not pending.by_client


def test_one_client_alone_does_not_share_the_engine() -> None:
    clients = RecentClients()
    for client, are_several in (("a", False), ("a", False), ("b", True)):
        clients.add(client)
        assert clients.are_several is are_several
