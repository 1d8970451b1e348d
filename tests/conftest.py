"""What every test process does: nothing of what it collects is looked through again by the collector of garbage."""

import gc

gc.disable()  # imports and collection make a million objects, and no garbage


def pytest_collection_finish() -> None:
    """From here on, only what tests make is looked through."""
    gc.freeze()
    gc.enable()
