"""What evaluations found, by the places of their images."""
import torch

from curves.records import Found


def test_the_images_of_an_attack_are_given_where_it_has_some():
    found = Found(torch.tensor([0.7, 0.2]).view(2, 1, 1, 1), torch.tensor([-1, 1, -1, 0]))
    x = torch.zeros(5, 1, 1, 1)
    assert found.at(x, torch.tensor([3, 0, 1, 9, 3])).flatten().tolist() == torch.tensor(
        [0.7, 0, 0.2, 0, 0.7]).tolist()
    assert x.sum() == 0
