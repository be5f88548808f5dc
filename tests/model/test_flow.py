"""Times and path of the flow, by hand-computed values."""

from __future__ import annotations

import pytest
import torch

from bagel_ds.model.flow import flow_time, noised, sampling_times


def test_flow_time_of_clean_and_half_noised_latents() -> None:
    raw = torch.tensor([float("-inf"), 0.0])
    assert flow_time(raw, 1.0).tolist() == [0.0, 0.5]
    assert flow_time(raw, 3.0).tolist() == [0.0, 0.75]


def test_the_path_goes_from_image_to_noise() -> None:
    image, noise = torch.ones(3, 2), torch.full((3, 2), 5.0)
    assert noised(image, noise, torch.tensor([0.0, 0.5, 1.0]))[:, 0].tolist() == [1.0, 3.0, 5.0]


def test_sampling_times_run_from_noise_to_image() -> None:
    assert sampling_times(3, 1.0).tolist() == [1.0, 0.5, 0.0]
    assert sampling_times(3, 3.0).tolist() == pytest.approx([1.0, 0.75, 0.0])
