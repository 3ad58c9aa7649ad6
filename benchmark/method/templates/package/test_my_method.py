from dfqbench.testing import method_checks
from my_method import MyMethod


def test_conformance() -> None:
    method_checks(MyMethod)
