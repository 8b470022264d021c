"""Costs against hand counts, table 1 of Li et al. 2023, and the arrays and programs of training itself."""

import json
import math
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import Array, lax

from mocosfl_jax import MomentumContrast, SplitModel, commandline, mocosfl, split_model
from mocosfl_jax.config import Data, quickstart, resolve
from mocosfl_jax.costs import __main__ as command
from mocosfl_jax.costs import accounting, flops
from mocosfl_jax.costs.accounting import Plan
from mocosfl_jax.costs.flops import forward_flops
from mocosfl_jax.errors import UserError
from mocosfl_jax.models.forms import ACCELERATOR
from tests.support.toy import make_toy_model, random_views
from tests.support.training import prepare

MB = 2**20
ROOT = pathlib.Path(__file__).parents[2]
NARROW = split_model(
    "resnet18", cut_layer=2, width=4, image_size=8, stem_stride=2, key_dim=8, forms=ACCELERATOR
)
MODELS = {"toy": (make_toy_model(), 4), "resnet": (NARROW, 8)}


def plan(**changes: Any) -> Plan:
    numbers = {"image_size": 4, "images": 48, "num_clients": 4, "cohort": 2, "batch_size": 3, "epochs": 6}
    return Plan(**(numbers | {"steps": 4, "syncs": 2, "queue_size": 16} | changes))


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, "float32")


def nbytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def conv(x: Array, kernel: Array, **settings: Any) -> Array:
    settings = {"window_strides": (1, 1), "padding": "SAME"} | settings
    return lax.conv_general_dilated(x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **settings)


def strided(x: Array, kernel: Array) -> Array:
    return conv(x, kernel, window_strides=(2, 2))


def depthwise(x: Array, kernel: Array) -> Array:
    return conv(x, kernel, feature_group_count=4)


def grouped(x: Array, kernel: Array) -> Array:
    return conv(x, kernel, window_strides=(2, 2), feature_group_count=2)


def transposed(x: Array, kernel: Array) -> Array:
    return conv(x, kernel, padding=((1, 2), (1, 2)), lhs_dilation=(2, 2))


@pytest.mark.parametrize(
    ("function", "x", "kernel", "multiply_adds"),
    [
        (jnp.matmul, (3, 4), (4, 5), 3 * 4 * 5),
        (jnp.matmul, (7, 3, 4), (7, 4, 5), 7 * 3 * 4 * 5),
        (conv, (2, 8, 8, 4), (3, 3, 4, 6), (2 * 8 * 8 * 6) * (3 * 3 * 4)),
        (strided, (2, 8, 8, 4), (3, 3, 4, 6), (2 * 4 * 4 * 6) * (3 * 3 * 4)),
        (grouped, (2, 8, 8, 4), (3, 3, 2, 6), (2 * 4 * 4 * 6) * (3 * 3 * 2)),
        (depthwise, (2, 8, 8, 4), (3, 3, 1, 4), (2 * 8 * 8 * 4) * (3 * 3)),
        (transposed, (2, 4, 4, 4), (3, 3, 4, 6), (2 * 4 * 4 * 4) * (3 * 3 * 6)),
        (jax.vmap(conv), (5, 2, 8, 8, 4), (5, 3, 3, 4, 6), 5 * (2 * 8 * 8 * 6) * (3 * 3 * 4)),
    ],
)
def test_products_and_convolutions_by_hand(
    function: Any, x: tuple[int, ...], kernel: tuple[int, ...], multiply_adds: int
) -> None:
    """Each of the two gradients costs as much as the forward pass."""

    def model(kernel: Array, x: Array) -> Array:
        return function(x, kernel)

    shapes = shape(*kernel), shape(*x)
    assert forward_flops(model, *shapes) == 2 * multiply_adds
    assert flops.backward_flops(model, *shapes, of_input=False) == 2 * multiply_adds
    assert flops.backward_flops(model, *shapes, of_input=True) == 4 * multiply_adds


def test_called_functions_are_counted() -> None:
    x = shape(4, 4)
    square = 2 * 4**3

    @jax.custom_jvp
    def custom(x: Array) -> Array:
        return x @ x

    custom.defjvps(lambda tangent, out, x: 2 * tangent)

    def repeated(x: Array) -> Array:
        return lax.scan(lambda x, _: (x @ x, None), x, length=5)[0]

    def either(x: Array) -> Array:
        return lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert forward_flops(lambda x: x + jnp.tanh(x), x) == 0
    assert forward_flops(jax.jit(lambda x: jax.nn.relu(x @ x)), x) == square
    assert forward_flops(jax.checkpoint(lambda x: x @ x), x) == square
    assert forward_flops(custom, x) == square
    assert forward_flops(repeated, x) == 5 * square
    assert forward_flops(either, x) == 2 * square
    with pytest.raises(ValueError, match="while loop"):
        forward_flops(lambda x: lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ x, x), x)


STEM = 2 * (32 * 32 * 64) * (3 * 3 * 3)
CONV = 2 * (32 * 32 * 64) * (3 * 3 * 64)


@pytest.mark.parametrize(
    ("cut_layer", "forward", "backward"), [(1, STEM, STEM), (2, STEM + 2 * CONV, STEM + 4 * CONV)]
)
def test_client_of_resnet18_by_hand(cut_layer: int, forward: int, backward: int) -> None:
    """The stem needs no gradient with respect to the images."""
    model = split_model("resnet18", cut_layer=cut_layer, forms=ACCELERATOR)
    assert accounting.client_flops(model, plan(image_size=32)) == (forward, forward, backward, 0)


def test_server_of_resnet18_by_hand() -> None:
    """Includes strides and shortcuts; the gradient of the first block's input goes back to the clients."""
    model = split_model("resnet18", cut_layer=1, key_dim=128, head="linear", forms=ACCELERATOR)
    maps = {64: 32 * 32, 128: 16 * 16, 256: 8 * 8, 512: 4 * 4}
    forward = 2 * 512 * 128 + 2 * maps[64] * 4 * 9 * 64 * 64
    for width in (128, 256, 512):
        half = width // 2
        forward += 2 * maps[width] * (9 * half * width + 3 * 9 * width * width + half * width)
    for symmetric, views in ((False, 1), (True, 2)):
        numbers = plan(image_size=32, queue_size=100, symmetric=symmetric)
        contrast = 2 * 2 * 128 * 100
        whole = (views * forward, views * forward, views * 2 * forward, views * contrast)
        assert accounting.server_flops(model, numbers) == whole
        frozen = accounting.server_flops(model, numbers._replace(frozen=True))
        assert frozen.backward == whole[2] - views * CONV


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("option", [{}, {"symmetric": False}, {"feature_sharing": False, "queue_size": 38}])
def test_flops_equal_the_training_steps(model: str, option: dict[str, Any]) -> None:
    split, size = MODELS[model]
    numbers = plan(image_size=size, **option)
    state, views, step = training(split, numbers)
    result = accounting.costs(split, numbers)
    clients = numbers.cohort * result.client.flops.step
    assert forward_flops(step, state, views) == clients + result.server.flops.step


@pytest.mark.parametrize("model", MODELS)
def test_traffic_is_what_training_exchanges(model: str) -> None:
    split, size = MODELS[model]
    numbers = plan(image_size=size)
    state, views, step = training(split, numbers)
    state, info = jax.eval_shape(step, state, views)
    traffic = accounting.client_traffic(split, numbers)
    assert traffic.smashed_up * numbers.cohort == nbytes(info.smashed)
    assert traffic.smashed_down * numbers.cohort == nbytes(info.smashed_grad)
    assert traffic.weights_up * numbers.cohort == nbytes(state.clients.params)
    assert traffic.weights_down * numbers.cohort == nbytes(state.clients.params)


def test_clients_without_parameters_receive_no_gradients() -> None:
    split = split_model("resnet18", cut_layer=0, width=4, image_size=8, stem_stride=2, key_dim=8)
    traffic = accounting.client_traffic(split, plan(image_size=8))
    images = 3 * 8 * 8 * 3 * 4
    assert traffic == accounting.ClientBytes(2 * images, 0, 0, 0)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("option", [{}, {"feature_sharing": False, "queue_size": 38}])
def test_memory_equals_the_training_states(model: str, option: dict[str, Any]) -> None:
    split, size = MODELS[model]
    numbers = plan(image_size=size, **option)
    state, *_ = training(split, numbers)
    client, server = accounting.client_memory(split, numbers), accounting.server_memory(split, numbers)
    n = numbers.cohort
    assert n * client.parameters == nbytes(state.clients.params) == n * client.gradient
    assert n * client.momentum_model == nbytes(state.clients.key_params)
    assert n * client.sgd_buffer == nbytes(state.clients.opt_state)
    assert server.parameters == nbytes(state.server.params) == server.gradient
    assert server.momentum_model == nbytes(state.server.key_params)
    assert server.sgd_buffer == nbytes(state.server.opt_state)
    queue = state.server.queue or state.pool.own.queue
    assert server.queue == nbytes(queue.keys)


def training(model: SplitModel, numbers: Plan) -> tuple[Any, Any, Any]:
    """Shapes of a cohort's state and of views, and the step itself, which computes nothing twice."""
    algorithm = mocosfl(
        model,
        num_clients=numbers.num_clients,
        moco=MomentumContrast(
            queue_size=numbers.queue_size,
            symmetric=numbers.symmetric,
            feature_sharing=numbers.feature_sharing,
        ),
    )
    views = random_views(0, numbers.cohort, numbers.batch_size)
    size = numbers.image_size
    views = jax.tree.map(lambda x: shape(*x.shape[:2], size, size, 3), views)
    cohort = jax.ShapeDtypeStruct((numbers.cohort,), "int32")
    state = jax.eval_shape(algorithm.enter, jax.eval_shape(algorithm.init, jax.random.key(0)), cohort)
    return state, views, algorithm.step


def test_a_backward_pass_keeps_the_input_of_each_layer() -> None:
    """The gradient of `tail` needs the hidden layer, that of `head` the input; weights are not kept twice."""

    def model(params: dict[str, Array], x: Array) -> Array:
        return x @ params["head"] @ params["tail"]

    params = {"head": shape(7, 5), "tail": shape(5, 2)}
    assert flops.kept_bytes(model, params, shape(3, 7), of_input=False) == 4 * (3 * 7 + 3 * 5)
    assert flops.kept_bytes(model, params, shape(3, 7), of_input=True) == 4 * (3 * 7 + 3 * 5)


def test_activations_grow_with_the_batch() -> None:
    """Except for the standardised kernels, which take the same memory for one image as for a batch."""
    batches = [
        accounting.client_memory(NARROW, plan(image_size=8, batch_size=b)).activations for b in (1, 2, 3)
    ]
    assert batches[2] - batches[1] == batches[1] - batches[0] > 0
    both = accounting.client_memory(NARROW, plan(image_size=8, batch_size=1, full_symmetric=True))
    assert both.activations == batches[1]


@pytest.mark.parametrize("momentum_models", [False, True])
def test_a_run_is_the_sum_of_its_steps_and_synchronizations(momentum_models: bool) -> None:
    split, _ = MODELS["toy"]
    numbers = plan(momentum_models=momentum_models)
    result = accounting.costs(split, numbers)
    traffic = accounting.client_traffic(split, numbers)
    up, down, flops = [0] * 4, [0] * 4, [0] * 4
    for epoch in range(numbers.epochs):
        members = (0, 1) if epoch % 2 else (2, 3)
        for step in range(numbers.steps):
            for i in members:
                up[i] += traffic.smashed_up
                down[i] += traffic.smashed_down
                flops[i] += numbers.batch_size * sum(result.client.flops_per_image)
            if step % 2:
                for i in range(4):
                    up[i] += traffic.weights_up if i in members else 0
                    down[i] += traffic.weights_down
    for i in range(4):
        assert (result.client.up.run, result.client.down.run, result.client.flops.run) == (
            (up[i], down[i], flops[i])
        )
    assert (result.server.up.run, result.server.down.run) == (sum(up), sum(down))
    images = numbers.epochs * numbers.steps * numbers.cohort * numbers.batch_size
    assert result.server.flops.run == images * sum(result.server.flops_per_image)
    assert result.server.up.epoch * numbers.epochs == result.server.up.run
    assert result.server.down.epoch * numbers.epochs == result.server.down.run


def test_options_change_what_a_client_pays() -> None:
    split, _ = MODELS["toy"]
    plain, averaged, buffers, both, frozen = (
        accounting.costs(split, plan(**{option: True} if option else {}))
        for option in ("", "momentum_models", "buffers", "full_symmetric", "frozen")
    )
    numbers = plan()
    weights = 4 * 3 * 5
    smashed = 4 * numbers.batch_size * 16 * 5
    assert plain.client.up.epoch == 4 * 2 * smashed + 2 * weights
    assert plain.client.down.epoch == 4 * smashed + 2 * weights
    assert averaged.client.up.epoch == 4 * 2 * smashed + 2 * 2 * weights
    assert averaged.client.down.epoch == 4 * smashed + 2 * 2 * weights
    assert (buffers.client.up, buffers.client.down) == (averaged.client.up, averaged.client.down)
    assert both.client.up.epoch == 4 * 4 * smashed + 2 * weights
    assert both.client.down.epoch == 4 * 2 * smashed + 2 * weights
    assert frozen.client.up.epoch == 4 * 2 * smashed
    assert frozen.client.down == (0, 0, 0)
    forward = 2 * 16 * 3 * 5
    assert plain.client.flops_per_image == (forward, forward, forward, 0)
    assert both.client.flops_per_image == (2 * forward, 2 * forward, 2 * forward, 0)
    assert frozen.client.flops_per_image == (forward, forward, 0, 0)
    assert frozen.client.memory == (weights, weights, 0, 0, 0, 0)
    assert both.server.flops_per_image == plain.server.flops_per_image  # symmetric by default


def c4s2(model: SplitModel) -> SplitModel:
    """A client that ends in a 3x3 convolution of stride 2 to four channels."""

    def init(rng: Array) -> tuple[Any, Any]:
        params, server = model.init(rng)
        return {"body": params, "bottleneck": jnp.zeros((3, 3, 64, 4))}, server

    def client(params: Any, images: Array) -> Array:
        return strided(model.client(params["body"], images), params["bottleneck"])

    return model._replace(init=init, client=client)


@pytest.mark.parametrize(
    ("cut_layer", "parameters", "megabytes"), [(1, 1_856, "1.416"), (2, 75_840, "57.86")]
)
def test_table_1_of_the_paper(cut_layer: int, parameters: int, megabytes: str) -> None:
    """1,000 clients of 50 images, 100 of them and one synchronization per epoch; 200 epochs per client."""
    model = split_model("resnet18", cut_layer=cut_layer, forms=ACCELERATOR)
    result = accounting.paper_costs(model, 32, images=50, epochs=200, syncs=200)
    forward = STEM // 2 + (cut_layer - 1) * CONV
    assert result.weights == 4 * 200 * parameters
    assert f"{result.weights / MB:.4g}" == megabytes
    assert result.smashed == 5_000 * MB
    assert result.flops_per_image == 3 * forward
    assert result.flops == 3 * forward * 200 * 50


def test_table_1_of_the_paper_with_a_bottleneck_and_frozen_clients() -> None:
    model = split_model("resnet18", cut_layer=1, forms=ACCELERATOR)
    result = accounting.paper_costs(c4s2(model), 32, images=50, epochs=200, syncs=200, frozen=True)
    assert result.weights == 0
    assert f"{result.smashed / MB:.2f}" == "39.06"
    assert result.flops_per_image == STEM // 2 + 16 * 16 * 4 * 9 * 64


def test_the_configuration_of_frozen_clients_has_the_traffic_of_table_1() -> None:
    """N = 1000: 200 epochs of 50 images; there is no traffic back, and nothing is averaged."""
    folder = pathlib.Path(__file__).parents[2] / "configs"
    config = resolve(commandline.load_config(str(folder / "taressfl.py"), ["1000"]))
    result = accounting.from_config(config)
    assert f"{result.paper.smashed / MB:.2f}" == "39.06" and result.paper.weights == 0
    assert result.parameters == 4_164
    assert result.client.down == (0, 0, 0)
    assert result.client.up.run == 2 * 200 * 50 * 4096  # queries and keys
    expert = resolve(commandline.load_config(str(folder / "resistant_expert.py")))
    own = quickstart()
    own.own.algorithm = lambda config, model, arguments: None
    with pytest.raises(UserError, match=r"config\.own\.algorithm: found .*<lambda>, allowed: None"):
        accounting.from_config(resolve(own))
    part = quickstart()
    part.clients.num, part.resist.target_share = 1, 0.1
    with pytest.raises(UserError, match=r"config\.resist\.target_share: found 0\.1, allowed: 1"):
        accounting.from_config(resolve(part))
    with pytest.raises(UserError, match=r"config\.resist\.strength: found 2\.0, allowed: 0"):
        accounting.from_config(expert)


def test_costs_without_concatenation_are_refused() -> None:
    config = quickstart()
    config.moco.concatenate = False
    with pytest.raises(
        UserError, match=r"config\.moco\.concatenate: found False, allowed: True \(other costs"
    ):
        accounting.from_config(resolve(config))


def test_a_configuration_gives_the_plan_of_its_run() -> None:
    """This includes the size of the data set, which is not read here."""
    config = quickstart()
    config.sync.frequency = 7
    config.sync.buffers = "average"
    config.moco.feature_sharing = False
    run = prepare(config)
    result = accounting.from_config(resolve(config))
    assert result.plan.images == len(run.dataset.x_train)
    assert result.plan.image_size == run.dataset.x_train.shape[1]
    assert result.plan.steps == run.steps_per_epoch
    assert result.plan.syncs == len(range(0, run.steps_per_epoch, run.steps_per_round))
    assert result.plan.epochs * result.plan.steps == run.total_steps
    assert result.plan.cohort == run.cohort
    assert result.plan.buffers and result.plan.keys == 2000 // 20
    assert result.server.memory.parameters == nbytes(jax.eval_shape(run.model.init, jax.random.key(0))[1])


def test_unknown_sizes_are_requested() -> None:
    config = quickstart()
    config.data = Data(name="food")
    with pytest.raises(UserError, match=r"^--images: found None for food, allowed: "):
        accounting.from_config(resolve(config))
    with pytest.raises(UserError, match=r"^--image_size: found None for food, allowed: "):
        accounting.from_config(resolve(config), images=200)
    with pytest.raises(UserError, match=r"^config.clients.num: found 20, allowed: 1 to 19 "):
        accounting.from_config(resolve(config), images=99, image_size=64)
    with pytest.raises(
        UserError, match=r"^--images: found 3, allowed: 100 or more .a batch of 5 for each of 20"
    ):
        accounting.from_config(resolve(config), images=3, image_size=64)
    assert accounting.from_config(resolve(config), images=200, image_size=64).plan.image_size == 64
    config.data.image_size = 32
    assert accounting.from_config(resolve(config), images=200, image_size=64).plan.image_size == 32
    config = quickstart()
    config.clients.batch_size, config.moco.queue_size = 6001, 400_000
    with pytest.raises(UserError, match=r"^config.clients.batch_size: found 6001, allowed: 1 to 6000 "):
        accounting.from_config(resolve(config))


def test_command_prints_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["costs", "--config.optim.client_lr=0", "--images=400", "--image_size=64"]) == 0
    printed = capsys.readouterr().out
    config = quickstart()
    config.optim.client_lr = 0.0
    result = accounting.from_config(resolve(config), images=400, image_size=64)
    assert result.plan.frozen
    assert printed == command.table(result) + "\n"
    assert (
        command.main(["costs", "--config.optim.client_lr=0", "--images=400", "--image_size=64", "--json"])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["plan"]["images"] == 400
    assert found["client"]["memory"] == result.client.memory._asdict()
    assert found["server"]["up"] == result.server.up._asdict()
    assert found["paper"] == result.paper._asdict()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--images=0", "flag --images=0"),
        ("--config.data.name=food", "--images: found None"),
        ("--config.model.cut_layer=14", "config.model.cut_layer: found 14, allowed: 0 to 8"),
        ("--workdir=x", "workdir"),
    ],
)
def test_command_reports_a_mistake_in_one_line(
    argument: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["costs", argument]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["costs", "--help"]) == 0
    assert "--image_size=PIXELS" in capsys.readouterr().out


def test_the_docs_show_what_the_command_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Except for the arrays kept for the backward pass, which JAX chooses."""
    monkeypatch.chdir(ROOT)
    (arguments, shown) = re.findall(
        r"```console\n\$ python -m mocosfl_jax.costs (\S+\.py.*?)\n(.*?)```",
        (ROOT / "docs" / "costs.md").read_text(),
        re.DOTALL,
    )[0]
    config = resolve(commandline.parse(["costs", *arguments.split()], "").config)
    printed = command.table(accounting.from_config(config)).splitlines()
    for line, real in zip(shown.splitlines(), printed, strict=True):
        if not line.startswith(("memory", "  activations")):
            assert line.rstrip() == real.rstrip()
