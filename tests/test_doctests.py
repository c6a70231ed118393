"""Every public name has an example in its docstring, and the example is right."""

import doctest
import importlib

import numpy as np
import pytest

import ddpm_jax
from ddpm_jax.files import writers

NAMES = [name for name in ddpm_jax.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of(name, monkeypatch):
    for printing in (writers.Progress.show, writers.Log.__call__):  # rates and times differ
        owner, method = printing.__qualname__.split(".")
        monkeypatch.setattr(getattr(writers, owner), method, lambda *args, **kwargs: None)
    thing = getattr(ddpm_jax, name)
    namespace = {"np": np, "dj": ddpm_jax, **vars(importlib.import_module(thing.__module__))}
    text = thing.__doc__
    test = doctest.DocTestParser().get_doctest(text, namespace, name, None, 0)
    assert test.examples, f"{name} has no example"
    report = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    assert runner.run(test, out=report.append).failed == 0, "".join(report)
