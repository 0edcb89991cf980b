"""Gradual density: a training that begins denser than it ends, in a few stages of constant sizes.

Zhu, Gupta, "To prune, or not to prune", 2017, and GraNet (Liu et al., "Sparse Training via Boosting Pruning Plasticity
with Neuroregeneration", NeurIPS 2021), with a sparse model at both ends:

    density(t) = final + (initial - final) * (1 - (t - start_step) / (end_step - start_step))^3

from `start_step` to `end_step`, constant before and after. `dsb_jax.restage` needs static shapes and a compilation for
each, so what is held is a staircase: `num_stages` stages of equal length, each with the density at which it begins,
and then the final one. By the numbers, 0.4 -> 0.1 in 5 stages until half of a training:

    share of the training    0      0.1     0.2     0.3     0.4     0.5 to 1
    density                  0.4    0.254   0.165   0.119   0.102   0.1         0.154 on average

**Memory**: in its first stage a gradual training holds `initial / final` times the weights, gradients and moments of
the final model (4 times above), and on average over its steps what the staircase gives (1.54 times). While `restage`
runs, weights and moments of the stage before and of the new one exist at the same time, but no gradient.
"""

import dataclasses
from collections.abc import Sequence

from dsb_jax.distributions import share_out, to_blocks
from dsb_jax.layout import max_blocks, num_active
from dsb_jax.methods.schedule import check_number, check_steps
from dsb_jax.plan import SparsityPlan, check_plan


@dataclasses.dataclass(frozen=True)
class GradualDensity:
    """When a training is how dense; a value, hashable. The final density is that of the plan that it is given.

    In a loop of one's own, `restage` comes between two steps and before an adaptation: weights that are grown begin at
    0, so a stage that began after that would prune them first.

        gradual = dsb.GradualDensity(initial_density=0.4, end_step=5_000)
        stages = dict(gradual.stages(plan))                    # {0: plan, 1000: plan, ..., 5000: the plan given}
        model = dsb.linen.sparsify(model, stages[0], method=method)
        ...
        for step in range(10_000):
            if step > 0 and step in stages:
                params, topology, opt_state = dsb.restage(
                    params, topology, opt_state, stages[step], method, optimizer, jax.random.fold_in(key, step)
                )
            if method.due(step):
                params, topology, opt_state, report = adapt(params, topology, opt_state, step, key, *batch)
            params, opt_state = train(params, topology, opt_state, *batch)

    The model serves every stage, since sizes are read from the topology; each stage compiles the steps once. Of an NNX
    model it is `dsb.nnx.restage(model, optimizer, stages[step], method, key)`, with the method that its layers were
    made with: `Static()`, shuffled blocks, where none was given.

    Attributes:
      initial_density: of the first stage, over the layers of a plan that can be sparse, in (0, 1].
      end_step: the first step of the final stage.
      num_stages: before that.
      start_step: until then the density is the initial one, and the first stage is longer than the others.

    Raises:
      ValueError: if a setting is invalid, or there are fewer steps than stages.
    """

    initial_density: float
    end_step: int
    num_stages: int = 5
    start_step: int = 0

    def __post_init__(self) -> None:
        check_number("initial_density", self.initial_density, 0, 1, hint="give the share of weights at first")
        object.__setattr__(self, "initial_density", float(self.initial_density))
        check_steps("end_step", self.end_step, least=1)
        check_steps("num_stages", self.num_stages, least=1)
        check_steps("start_step", self.start_step, least=0)
        if (steps := self.end_step - self.start_step) < self.num_stages:
            raise ValueError(
                f"num_stages={self.num_stages} do not fit between start_step={self.start_step} and "
                f"end_step={self.end_step}; give at most {max(steps, 0)}, or more steps."
            )

    @property
    def begins(self) -> tuple[int, ...]:
        """The first step of each stage, 0 and `end_step` included."""
        length = (self.end_step - self.start_step) / self.num_stages
        return (0, *(self.start_step + round(i * length) for i in range(1, self.num_stages)), self.end_step)

    def density(self, step: int, final_density: float) -> float:
        """The curve, of which each stage has the value at its first step."""
        time = (step - self.start_step) / (self.end_step - self.start_step)
        left = (1 - min(max(time, 0), 1)) ** 3
        return final_density + (self.initial_density - final_density) * left

    def stages(self, plan: SparsityPlan) -> tuple[tuple[int, SparsityPlan], ...]:
        """(first step, plan) of each stage, the first at step 0, the last with the plan that is given.

        Args:
          plan: of the final stage. Its sparse layers stay sparse, with their block shapes; the blocks of all of them,
            those with a sparsity of their own included, are multiplied by one factor, as far as a layer has room, so
            that the density over the eligible layers is met but for rounding to whole blocks. No layer ever grows.

        Raises:
          ValueError: if the plan is denser than `initial_density`.
        """
        final = 1 - check_plan(plan).sparsity()
        if self.initial_density < final:
            raise ValueError(
                f"initial_density={self.initial_density} is below the plan's density of {final:.6g}; give more, up to "
                "1, or a sparser plan."
            )
        stages = [(self.end_step, plan)]
        for step in reversed(self.begins[:-1]):
            held = scale_plan(plan, self.density(step, final), least=stages[-1][1])
            if held == stages[-1][1]:  # of a small model several densities may be the same blocks
                stages.pop()
            stages.append((step, held))
        return tuple(reversed(stages))

    def plan_after(self, plan: SparsityPlan, done: int) -> SparsityPlan:
        """The plan of the weights after `done` steps, say in a checkpoint: a stage that begins at `done` has not yet.

        Args:
          plan: of the final stage.
          done: steps that were taken.
        """
        return stage_after(self.stages(plan), done)[1]


def stage_after[Stage: tuple](stages: Sequence[Stage], done: int) -> Stage:  # type: ignore[type-arg]
    """The stage of a state after `done` steps: one that begins at `done` has not begun.

    Args:
      stages: in order, each with its first step in front.
      done: steps that were taken.
    """
    return [stage for stage in stages if stage[0] < max(done, 1)][-1]


def scale_plan(plan: SparsityPlan, density: float, *, least: SparsityPlan) -> SparsityPlan:
    """The plan with more blocks in each sparse layer, as many in all as make up `density` over its eligible layers.

    Args:
      plan: its numbers of blocks are multiplied; no layer gets more than fits.
      density: of the eligible layers, those that stay dense included; no less than the plan's.
      least: no layer gets less than it has there, which rounding could do.
    """
    sparse, floor = plan.sparse, least.sparse
    always = sum(spec.num_layers * spec.size for path, spec in plan.eligible.items() if path not in sparse)
    total = sum(spec.num_layers * spec.size for spec in plan.eligible.values())
    specs, shapes = list(sparse.values()), [spec.block_shape for spec in sparse.values()]
    most = [num_active(spec.shape, spec.block_shape, max_blocks(spec.shape, spec.block_shape)) for spec in specs]
    weights = share_out(specs, [spec.num_active for spec in specs], density * total - always, most=most)
    counts = to_blocks(specs, [each / spec.size for each, spec in zip(weights, specs, strict=True)], shapes)
    planned = {
        path: spec.with_blocks(spec.block_shape, max(count, floor[path].num_blocks))
        for (path, spec), count in zip(sparse.items(), counts, strict=True)
    }
    layers = tuple(layer._replace(planned=planned.get(layer.path, layer.planned)) for layer in plan.layers)
    return dataclasses.replace(plan, layers=layers)
