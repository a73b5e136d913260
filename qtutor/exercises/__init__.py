"""The checks behind the exercises of the notebooks.

Each check gets the reader's answer.  It raises WrongAnswer with one sentence that helps on, or returns None or a
sentence of praise (see :mod:`qtutor.lesson`; :mod:`.answers` has what the checks share).  The solution and typical
wrong answers are registered with it: the tests try them all.

One module a topic; the name of an exercise begins with it: "number_formats.largest".
"""

from . import (  # noqa: F401 - each registers its exercises
    choosing,
    fake_quantization,
    fp8_scaling,
    fp8_speed_and_memory,
    fp8_training,
    llama2_70b_on_one_gpu,
    measuring_the_tradeoff,
    number_formats,
    ptq_fundamentals,
    ptq_llamacpp,
    qat,
    start_here,
)
