"""What a run asks the cluster for, and the message when there is too little of it."""

import pytest

from cluster.placement import rank_resources
from configs.errors import CapacityError
from configs.load import parse_config
from tests.test_configs import tree


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"parallelism__data": 2}, "parallelism.data: 2 ranks x 1 CPU"),
        ({"parallelism__data": 2, "elastic__min_replicas": 2}, "elastic.min_replicas: 2 ranks x 1 CPU"),
    ],
)
def test_too_few_nodes_name_the_field_that_asks_for_them(settings, named):
    config = parse_config(tree(**settings, cluster__device="cpu"), "here")
    with pytest.raises(CapacityError) as raised:
        rank_resources(config, {"CPU": 1.0})
    field = named.split(":")[0]
    assert named in str(raised.value) and f"set {field} to 1" in str(raised.value)


def test_fewer_nodes_than_parallelism_asks_for_are_enough_for_an_elastic_run():
    config = parse_config(tree(parallelism__data=2, elastic__min_replicas=1, cluster__device="cpu"), "here")
    assert rank_resources(config, {"CPU": 1.0}).cpus == 1
