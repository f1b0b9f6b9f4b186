"""Steps that cannot be recorded as CUDA graphs are taken as they are."""

import pytest
import torch

from csalign.objective.loss import LossParts
from csalign.training.network.sampler import Batch, SideBatch
from csalign.training.network.step import WARM_UP, Recorder, Taken


@pytest.mark.skipif(torch.cuda.is_available(), reason="they can be recorded here")
def test_steps_that_cannot_be_recorded_are_taken(caplog: pytest.LogCaptureFixture) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    recorder, zero = Recorder(torch.device("cuda")), torch.zeros(())

    def compute(batch: Batch) -> Taken:
        return Taken(LossParts(batch.images.rows.sum(), zero, zero, zero), zero)

    for number in range(WARM_UP + 3):
        side = SideBatch(torch.full((2, 3), float(number)), [2, 0, 0, 0], None)
        taken = recorder.run(compute, Batch(side, side, None, none, (none, none)), 0.1)
        assert taken.parts.total == 6 * number

    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cannot be recorded as CUDA graphs" in caplog.text
