"""What several test files share."""
import pytest


@pytest.fixture
def interrupt():
    "A function that lets an objective be interrupted before forward number `stop`, and returns the list that counts its forwards."
    def at(objective, stop):
        calls, forward = [], objective.forward
        def counted(batch):
            if len(calls) == stop: raise KeyboardInterrupt
            calls.append(1)
            return forward(batch)
        objective.forward = counted
        return calls
    return at
