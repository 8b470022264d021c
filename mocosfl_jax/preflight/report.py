"""The figures of programs as text."""

from mocosfl_jax.parallel import mesh as meshes
from mocosfl_jax.preflight.devices import Kind
from mocosfl_jax.preflight.figures import ESTIMATES, Figures
from mocosfl_jax.training.experiment import Run


def header(run: Run, kind: Kind) -> str:
    """What is compiled, and for which devices."""
    config = run.config
    size = run.dataset.x_train.shape[1]
    cohort = "all" if run.whole_pool else f"{run.cohort:,}"
    kept = "on each device" if run.residence.resident else "streamed from the host"
    return (
        f"{config.algorithm}: {config.model.name} cut at {config.model.cut_layer}, computing in "
        f"{config.model.compute_dtype}; {config.clients.num:,} clients, {cohort} in each epoch, "
        f"{run.images_per_step:,} images a step\n"
        f"{len(run.dataset.x_train):,} images of {size} px, {kept}\n"
        f"for {run.mesh.size} x {kind.name}{meshes.describe(run.mesh)}, {memory(kind.memory)} each\n"
    )


def table(figures: Figures, kind: Kind) -> str:
    """The figures of one program: a line of memory, a line of work, and what costs most."""
    room = kind.memory - figures.memory
    verdict = f"fits, {memory(room)} to spare" if figures.fits else f"does not fit, {memory(-room)} too much"
    lines = [
        f"{figures.program:<7} {memory(figures.memory):>10}  {verdict}  (state {memory(figures.state)}, "
        f"images {memory(figures.images)}, temporary {memory(figures.temporary)}); "
        f"compiled in {figures.seconds:.0f} s"
    ]
    work = figures.work
    if work is None:
        return lines[0]
    unit = "a step" if figures.program == "round" else "a call"
    lines.append(
        f"{'':<7} estimate {work.milliseconds:,.4g} ms {unit}, {work.flops:.3g} FLOP = {work.share:.1%} "
        f"of the peak; {work.kernels:,} kernels, {memory(work.moved)} moved"
    )
    if work.collectives:
        sent = ", ".join(f"{name} {memory(count)}" for name, count in work.collectives.items())
        lines.append(f"{'':<7} between devices: {sent}")
    if work.milliseconds >= 0.1:
        for cost in work.costs:
            share = cost.milliseconds / work.milliseconds
            lines.append(f"{'':<9} {share:>5.1%} in {cost.kernels:>5.4g} kernels  {cost.place}")
    return "\n".join(lines)


def footer(kind: Kind) -> str:
    """How the times were estimated."""
    return f"\nTimes are estimates: {ESTIMATES[kind.platform]}. Figures are for one device."


def memory(count: float) -> str:
    """Bytes in MiB or GiB."""
    return f"{count / 2**20:,.1f} MiB" if abs(count) < 2**30 else f"{count / 2**30:,.2f} GiB"
