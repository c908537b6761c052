"""One listener's endless stream, made ahead of time by a thread of its own.

    session = Session(voice, deliver)
    session.begin(seed=1)
    session.ask(1, until=48_000)          # deliver() gets pieces of a tenth of a second, then the thread rests
    session.change(1, start=3_200, temperature=0.8, top_p=1.0)    # the pieces from there on are made again
    session.close()

A listener asks for samples up to a place, as it plays. So a listener that is slow, pauses or has gone costs nothing,
and holds up nobody else.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Callable

import numpy as np

from harmonic.generate import Mark, Streams
from harmonic.voice import LONGEST, Voice

MOST_AHEAD_SECONDS = 10.0  # that are made before they are played, whatever is asked for
_LEAD_SECONDS = 2.0  # of a prompt that is heard before its continuation
_UNDELIVERED = 4  # pieces that wait to be sent; then the thread rests


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of a stream.

    Attributes:
      stream: its number among the session's, from 1.
      position: of its first sample, from the stream's beginning.
      seconds: that it took to make; 0 for the prompt, which is not made.
      sound: float32 [time] in [-1, 1].
    """

    stream: int
    position: int
    seconds: float
    sound: np.ndarray


@dataclasses.dataclass(frozen=True)
class Settings:
    """How pieces are sampled; see `harmonic.generate.generate`."""

    temperature: float = 1.0
    top_p: float = 1.0


class Session:
    """A listener's stream. All methods return at once.

    Args:
      voice: the model and its codec; sessions share it.
      deliver: called with each piece, from the session's thread; then `sent` must follow once the piece is away.
      begun: called with the stream's number and the samples of a prompt that are heard first, before its first piece.
      failed: called with an exception that ended the thread.
    """

    def __init__(
        self,
        voice: Voice,
        deliver: Callable[[Piece], None],
        begun: Callable[[int, int], None] = lambda stream, lead: None,
        failed: Callable[[Exception], None] = lambda error: None,
    ):
        self._voice, self._deliver, self._begun, self._failed = voice, deliver, begun, failed
        self._rate = voice.codec.sample_rate
        self._changed = threading.Condition()
        self._stream, self._until, self._played, self._away = 0, 0, 0, 0
        self._settings = Settings()
        self._beginning: tuple[int, np.ndarray | None] | None = None
        self._start: int | None = None
        self._closed = False
        # The thread's own: the streams, and the samples of the prompt that are heard before them.
        self._made: Streams | None = None
        self._lead = 0
        self._thread = threading.Thread(target=self._work, name="listener", daemon=True)
        self._thread.start()

    def begin(self, seed: int, prompt: np.ndarray | None = None) -> int:
        """Begins a new stream, which may continue a prompt, tokens [time, 1]; gives its number."""
        with self._changed:
            self._stream += 1
            self._beginning, self._start = (seed, prompt), None
            self._until = self._played = 0
            self._changed.notify()
            return self._stream

    def ask(self, stream: int, until: int, played: int = 0) -> None:
        """Has samples made up to a place. `played`: what was heard; nothing before it is made again."""
        with self._changed:
            if stream == self._stream:
                self._played = max(self._played, played)
                self._until = max(self._until, min(until, self._played + round(MOST_AHEAD_SECONDS * self._rate)))
                self._changed.notify()

    def change(self, stream: int, start: int, settings: Settings) -> None:
        """Samples with other settings from a place on, or from the first place behind it that can be gone back to."""
        with self._changed:
            if settings != self._settings:
                self._settings = settings
                if stream == self._stream:
                    self._start = start
                self._changed.notify()

    def sent(self) -> None:
        """Says that a piece that was delivered is away."""
        with self._changed:
            self._away -= 1
            self._changed.notify()

    def close(self) -> None:
        """Ends the stream and its thread, once the piece that is being made is done."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def join(self, timeout: float | None = None) -> bool:
        """Waits for the thread's end; whether it has ended."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _work(self) -> None:
        try:
            self._make_pieces()
        except Exception as error:
            self._failed(error)

    def _make_pieces(self) -> None:
        voice, size = self._voice, piece_size(self._rate)
        marks: collections.deque[Mark] = collections.deque()  # the places of the pieces that are not played yet
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._wanted())
                if self._closed:
                    return
                beginning, self._beginning = self._beginning, None
                start, self._start = self._start, None
                stream, settings, played = self._stream, self._settings, self._played
            if beginning is not None:
                seed, prompt = beginning
                self._made = Streams(
                    voice.model, voice.params, batch=1, chunk=size, seed=seed, prompt=prompt, help=False
                )
                heard = None if prompt is None else prompt[-round(_LEAD_SECONDS * self._rate) :]
                self._lead = 0 if heard is None else len(heard)
                marks.clear()
                self._begun(stream, self._lead)
                if heard is not None:
                    self._hand_over(Piece(stream, 0, 0.0, voice.codec.decode(heard)))
                continue
            made, lead = self._made, self._lead
            assert made is not None
            while marks and lead + marks[0].position + size < played:
                marks.popleft()
            if start is not None:
                later = [mark for mark in marks if lead + mark.position >= start]
                if later:
                    made.rewind(later[0])
                    while marks and marks[-1].position >= later[0].position:
                        marks.pop()
                continue  # from that place on there may be something to make, or not
            marks.append(made.mark())
            position, began = lead + made.position, time.perf_counter()
            tokens = made.draw(size, temperature=settings.temperature, top_p=settings.top_p).tokens
            seconds = time.perf_counter() - began
            self._hand_over(Piece(stream, position, seconds, voice.codec.decode(tokens)[0]))

    def _wanted(self) -> bool:
        """Whether there is something to do."""
        if self._beginning is not None:
            return True
        if self._made is None:
            return False
        if self._start is not None:
            return True
        place = self._lead + self._made.position
        return self._away < _UNDELIVERED and place < min(self._until, LONGEST)

    def _hand_over(self, piece: Piece) -> None:
        with self._changed:
            self._away += 1
        self._deliver(piece)


def piece_size(sample_rate: int) -> int:
    """Samples of a piece: a tenth of a second, as `harmonic.pretrained` streams them."""
    return max(sample_rate // 10, 1)
