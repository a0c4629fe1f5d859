"""Progress in the terminal."""

from __future__ import annotations

from tqdm import tqdm


class ProgressBar:
    """Shows (done, total, what) as a tqdm bar; a new one when the count begins again."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def __call__(self, done: int, total: int, what: str) -> None:
        if self.bar is None or total != self.bar.total or done < self.bar.n:
            self.close()
            self.bar = tqdm(total=total, dynamic_ncols=True)
        self.bar.set_description(what, refresh=False)
        self.bar.update(done - self.bar.n)
        if done >= total:
            self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
