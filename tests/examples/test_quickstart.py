"""The tutorial in examples/ runs, and its network learns."""

import pathlib
import runpy

QUICKSTART = pathlib.Path(__file__).parents[2] / "examples" / "quickstart.py"


def test_the_quickstart_learns() -> None:
    main = runpy.run_path(str(QUICKSTART))["main"]
    untrained, first, *_, trained = main(
        epochs=4, num_clients=10, batch_size=2, syncs_per_epoch=4, width=4, queue_size=400, max_images=1000
    )
    assert trained["kNN"] > untrained["kNN"] + 0.05
    assert trained["loss"] < first["loss"]
