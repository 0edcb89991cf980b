"""What reaches what in a traced program: which outputs depend on which inputs, and how often an input is used.

Two questions need it, and neither can be answered by values: whether the update of a layer depends on its gradient
(that of a frozen layer does not; that of a warm-up's first step does, though it is zero), and at how many places a
layer is called.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from jax.extend.core import Literal

# Their bodies run again on what they return, so position by position is not enough.
_LOOPS = ("scan", "while")


def _open(jaxpr: Any) -> Any:
    """The jaxpr itself, of one that is closed over constants, too."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _bodies(equation: Any) -> list[tuple[Any, Sequence[Any]]]:
    """The programs inside of an equation that take its operands one by one, each with these operands.

    Of a conditional its branches; of a loop its body; none of what is opaque (a kernel).
    """
    if equation.primitive.name == "cond":
        return [(_open(branch), equation.invars[1:]) for branch in equation.params["branches"]]
    if equation.primitive.name == "while":
        skipped = equation.params["cond_nconsts"]
        return [(_open(equation.params["body_jaxpr"]), equation.invars[skipped:])]
    found = [_open(value) for value in equation.params.values() if hasattr(_open(value), "eqns")]
    return [(body, equation.invars) for body in found if len(body.invars) == len(equation.invars)]


def dependencies(jaxpr: Any) -> list[frozenset[int]]:
    """For each output of a (closed) jaxpr the numbers of the inputs it may depend on.

    Exact through calls and conditionals; of a loop or an opaque equation every output depends on every operand. Whether
    a number is finite does not count: it is of every gradient, but where a step is skipped.
    """
    jaxpr = _open(jaxpr)
    reached = {variable: frozenset([i]) for i, variable in enumerate(jaxpr.invars)}

    def of(variables: Iterable[Any]) -> frozenset[int]:
        known = (reached.get(v, frozenset()) for v in variables if not isinstance(v, Literal))
        return frozenset().union(*known)

    for equation in jaxpr.eqns:
        if equation.primitive.name == "is_finite":
            continue
        bodies = [] if equation.primitive.name in _LOOPS else _bodies(equation)
        bodies = [(body, operands) for body, operands in bodies if len(body.outvars) == len(equation.outvars)]
        if not bodies:
            everything = of(equation.invars)
            reached |= dict.fromkeys(equation.outvars, everything)
            continue
        choice = of(equation.invars[:1]) if equation.primitive.name == "cond" else frozenset()
        outputs = [choice] * len(equation.outvars)
        for body, operands in bodies:
            for i, inner in enumerate(dependencies(body)):
                outputs[i] |= of(operands[j] for j in inner)
        reached |= dict(zip(equation.outvars, outputs, strict=True))
    return [of([variable]) for variable in jaxpr.outvars]


def count_uses(jaxpr: Any, inputs: Iterable[int]) -> Counter[int]:
    """At how many places of a program each of some inputs is an operand of a function with a derivative of its own.

    (`jax.custom_vjp`, which is what `dsb_jax.ops.statistics.observe` is.) A place inside of a loop counts once, however
    often it runs; of the branches of a conditional the one with the most counts.
    """
    jaxpr = _open(jaxpr)
    uses, _ = _count(jaxpr, {jaxpr.invars[i]: frozenset([i]) for i in inputs})
    return uses


def _count(jaxpr: Any, tracked: dict[Any, frozenset[int]]) -> tuple[Counter[int], list[frozenset[int]]]:
    """The uses of what the tracked variables stand for, and what each output stands for."""
    uses: Counter[int] = Counter()
    nothing: frozenset[int] = frozenset()

    def stands_for(variable: Any) -> frozenset[int]:
        return nothing if isinstance(variable, Literal) else tracked.get(variable, nothing)

    for equation in jaxpr.eqns:
        here = nothing.union(*(stands_for(v) for v in equation.invars))
        if not here:
            continue
        inside: Counter[int] = Counter()
        outputs = [nothing] * len(equation.outvars)
        bodies = _bodies(equation)
        for body, operands in bodies:
            inner = {v: stands_for(o) for v, o in zip(body.invars, operands, strict=True) if stands_for(o)}
            counted, results = _count(body, inner)
            inside |= counted  # the larger of two branches
            if len(results) == len(outputs):
                outputs = [a | b for a, b in zip(outputs, results, strict=True)]
        if equation.primitive.name.startswith("custom_vjp"):
            inside |= Counter(dict.fromkeys(here, 1))
            outputs = [nothing] * len(outputs)
        elif not bodies:
            outputs = [here] * len(outputs)  # a slice, a copy: the same thing under another name
        uses += inside
        tracked = tracked | dict(zip(equation.outvars, outputs, strict=True))
    return uses, [stands_for(variable) for variable in jaxpr.outvars]
