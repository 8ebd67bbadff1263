import gc


def pytest_collection_finish() -> None:
    # What was imported stays. A trainer cleans up after every run, and would look through all of it each time.
    gc.freeze()
