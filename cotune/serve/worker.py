"""Questions that wait are answered together: one thread owns model and engine, and takes what has arrived meanwhile.

Knows nothing of HTTP.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from queue import Empty, Full, Queue
from typing import Any

from cotune.bench import Bench, MemoryStore
from cotune.engines.base import Sampling
from cotune.errors import CotuneError, UsageError
from cotune.evaluate import Question, complete
from cotune.opened import Opened
from cotune.serve.protocol import Refused
from cotune.values import GREEDY, Completion, Conditioning, Example, Samples

logger = logging.getLogger(__name__)

MOST_WAITING = 1024

Answer = tuple[Conditioning, list[Completion], Samples | None]


class _Forgetful(MemoryStore):
    """A server runs for weeks: nothing is kept of what it has answered."""

    def remember(self, key: str, value: Any) -> None: ...


@dataclass(frozen=True, eq=False)
class _Job:
    example: Example
    sampling: Sampling
    drawing: Sampling | None
    answer: Future[Answer] = field(default_factory=Future)


class Worker:
    """Answers up to `together` questions in one go; more than MOST_WAITING are not let in."""

    def __init__(self, opened: Opened) -> None:
        self.opened = opened
        self._bench: Bench = opened.bench("serve", store=_Forgetful())
        vllm = self._bench.engine.name == "vllm"
        self.together = opened.config.vllm.sequences if vllm else opened.config.runner.batch_size
        self._queue: Queue[_Job | None] = Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._work, name="cotune-worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def ask(self, example: Example, sampling: Sampling, drawing: Sampling | None = None) -> Future[Answer]:
        """`drawing`, if given, is what a plan of several samples draws with in place of `sampling`.

        The future raises Refused. Raises Refused itself when too many are waiting.
        """
        job = _Job(example, sampling, drawing)
        try:
            self._queue.put_nowait(job)
        except Full:
            raise Refused(503, f"{MOST_WAITING} questions are waiting. Ask again later.", None, "busy") from None
        return job.answer

    def close(self) -> None:
        """Waits for what has been asked. Questions that nobody waits for any more are skipped."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while True:
            jobs = [self._queue.get()]
            with suppress(Empty):
                while len(jobs) < self.together:
                    jobs.append(self._queue.get_nowait())
            self._answer([job for job in jobs if job and job.answer.set_running_or_notify_cancel()])
            if None in jobs:
                return

    def _answer(self, jobs: list[_Job]) -> None:
        """When something fails, each question alone, so that none has to pay for another."""
        if not jobs:
            return
        try:
            answers = self._answers(jobs)
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    self._answer([job])
            else:
                jobs[0].answer.set_exception(_refusal(error))
            return
        for job, answer in zip(jobs, answers, strict=True):
            job.answer.set_result(answer)

    def _answers(self, jobs: list[_Job]) -> list[Answer]:
        """Prompts and adapters of all of them, then one generation for each way of decoding."""
        opened, bench = self.opened, self._bench
        answers: dict[int, Answer] = {}
        with bench.ledger.measuring():
            conditionings = opened.tuned.condition([job.example for job in jobs], bench)
            questions = []
            for job, c in zip(jobs, conditionings, strict=True):
                plan, sampling = c.plan, job.drawing
                if plan == GREEDY or sampling is None:
                    plan, sampling = GREEDY, job.sampling
                questions.append(Question.of(opened.task, job.example, replace(c, plan=plan), sampling, bench))
                bench.engine.plan([questions[-1].request], job.sampling)  # says when it is too long

            def answer(i: int, row: list[Completion], samples: Samples | None) -> None:
                answers[i] = conditionings[i], [row[samples.chosen]] if samples else row, samples

            complete(opened.task, questions, bench, answer)
        return [answers[i] for i in range(len(jobs))]


def _refusal(error: Exception) -> Refused:
    if isinstance(error, UsageError):
        return Refused(400, str(error))
    if isinstance(error, CotuneError):
        return Refused(500, str(error))
    logger.error("A question could not be answered.", exc_info=error)
    return Refused(500, f"{type(error).__name__} while answering. This looks like a bug; the server's log shows where.")
