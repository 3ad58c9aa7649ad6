from dfqbench.testing import allocator_checks
from my_allocator import MyAllocator


def test_conformance() -> None:
    allocator_checks(MyAllocator)
