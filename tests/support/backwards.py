"""Backwards on a thread of their own, as autograd has one for each device that is no CPU."""

from __future__ import annotations

import threading
from typing import Any


def on_another_thread(backward: Any) -> Any:
    """Returns `backward` as a call that another thread makes; what that raises is raised here."""

    def act(*args: Any, **options: Any) -> None:
        failed: list[BaseException] = []

        def run() -> None:
            try:
                backward(*args, **options)
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if failed:
            raise failed[0]

    return act
