"""The checks behind the exercises of the notebooks.

Each check gets the reader's answer.  It raises WrongAnswer with one sentence that helps on, or returns None or a
sentence of praise (see :mod:`qtutor.lesson`; :mod:`.answers` has what the checks share).  The solution and typical
wrong answers are registered with it: the tests try them all.

One module a topic; the name of an exercise begins with it: "number_formats.decode".
"""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")  # registers its exercises
