"""The checks behind the exercises of the notebooks.

Each check looks at the reader's answer and raises AssertionError with one sentence that helps on when it is wrong;
when it is right it returns None or a sentence of praise (see :mod:`qtutor.lesson`).  The solution and typical wrong
answers are registered with it: the tests try them all.

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
