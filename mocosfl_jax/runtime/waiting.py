"""A line on the screen while the program waits for something long, such as a compiler."""

import contextlib
import threading
from collections.abc import Iterator

from tqdm import tqdm


@contextlib.contextmanager
def waiting(text: str, *, shown: bool = True) -> Iterator[None]:
    """While the block runs, show `text` and the time gone by on stderr, if that is a terminal."""
    done = threading.Event()
    with tqdm(
        bar_format="{desc}: {elapsed}", desc=text, leave=False, disable=None if shown else True
    ) as line:

        def tick() -> None:
            while not done.wait(1):
                line.refresh()

        clock = threading.Thread(target=tick, daemon=True)
        clock.start()
        try:
            yield
        finally:
            done.set()
            clock.join()
