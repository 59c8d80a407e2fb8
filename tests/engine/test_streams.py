from __future__ import annotations

import pytest
import torch

from hf_qep.engine.streams import StreamStore

CPU = torch.device("cpu")


@pytest.mark.parametrize("budget", [0, 600, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stream_gives_back_what_it_was_given_in_memory_or_on_disk(tmp_path, budget, dtype):
    batches = [torch.randn(2, 8, 8).to(dtype) for _ in range(4)]
    with StreamStore(budget, tmp_path) as store:
        stream = store.stream()
        for batch in batches:
            stream.append(batch)
        assert all(torch.equal(stream.get(i, CPU), b) for i, b in enumerate(batches))
        stream.replace(1, batches[0])
        assert torch.equal(stream.get(1, CPU), batches[0])
        assert store.used_bytes <= budget
        assert (store.spilled_bytes > 0) == (budget < 1000)
        stream.clear()
        assert store.used_bytes == 0
    assert list(tmp_path.iterdir()) == []


def test_a_kept_tensor_does_not_change_with_its_source(tmp_path):
    with StreamStore(1 << 20, tmp_path) as store:
        stream, x = store.stream(), torch.ones(3)
        stream.append(x)
        x.zero_()
        assert stream.get(0, CPU).tolist() == [1, 1, 1]
