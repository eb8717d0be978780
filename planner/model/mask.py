"""Which keys of its sequence a query sees."""

from __future__ import annotations

from dataclasses import dataclass, replace

from heteromesh.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Mask:
    """The keys that a query sees; raises UserError where the numbers make no mask.

    Positions count from 0 in every sequence. Limits add up: a key is seen where each of them allows it.
    """

    causal: bool = True
    """The query's own key and those before it; False: all."""
    window: int | None = None
    """The last `window` of those, the query's own included (Mistral, Gemma, GPT-OSS)."""
    chunk: int | None = None
    """Those in the query's own chunk, where chunks of so many tokens begin at position 0 (Llama-4)."""

    def __post_init__(self) -> None:
        for name, size in (("window", self.window), ("chunk", self.chunk)):
            if size is not None and size < 1:
                raise UserError(f"attention with {name}={size}: it must be at least 1, or None for no limit")
        if self.window is not None and not self.causal:
            raise UserError(
                f"attention with window={self.window} and causal=False: windows are those of causal attention, "
                "leave out one of the two"
            )

    def within(self, longest: int) -> Mask:
        """Returns the simplest mask that is equal on sequences of at most so many tokens."""
        return replace(
            self,
            window=None if self.window is None or self.window >= longest else self.window,
            chunk=None if self.chunk is None or self.chunk >= longest else self.chunk,
        )

    @property
    def reach(self) -> float | None:
        """Keys before a place in a sequence that queries after it see, in the mean; None: all."""
        limits = [n for n in (self.window and self.window - 1, self.chunk and self.chunk / 2) if n is not None]
        return min(limits, default=None)

    @property
    def span(self) -> float | None:
        """Keys that a query far into a sequence sees, in the mean; None: it grows with the sequence."""
        chunk = self.chunk and self.chunk / (2 if self.causal else 1)
        limits = [n for n in (self.window, chunk) if n is not None]
        return min(limits, default=None)


CAUSAL = Mask()
