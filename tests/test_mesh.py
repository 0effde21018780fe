"""Places of ranks: the numbering and its inverse, lines along each axis, neighbours on one node."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from model.mesh import ALONE, AXES, Mesh, ParallelContext, Place

sizes = st.integers(1, 5)
meshes = st.builds(Mesh, data=sizes, pipeline=sizes, tensor=sizes)


@settings(deadline=None)
@given(mesh=meshes)
def test_every_place_has_one_rank_in_the_order_data_pipeline_tensor(mesh):
    places = [
        Place(*at) for at in itertools.product(*(range(size) for size in (mesh.data, mesh.pipeline, mesh.tensor)))
    ]
    assert [mesh.rank(place) for place in places] == list(range(mesh.size)) and mesh.size == len(places)
    assert [mesh.place(rank) for rank in range(mesh.size)] == places


@settings(deadline=None)
@given(mesh=meshes, axis=st.sampled_from(AXES))
def test_lines_are_the_ranks_that_differ_on_one_axis(mesh, axis):
    lines = mesh.lines(axis)
    assert sorted(rank for line in lines for rank in line) == list(range(mesh.size))
    assert {len(line) for line in lines} == {getattr(mesh, axis)}
    for line in lines:
        places = [mesh.place(rank)._asdict() for rank in line]
        assert [place.pop(axis) for place in places] == list(range(len(line)))
        assert all(place == places[0] for place in places)


@settings(deadline=None)
@given(mesh=meshes, nodes=st.integers(1, 4))
def test_tensor_ranks_are_neighbours_and_replicas_follow_each_other(mesh, nodes):
    for line in mesh.lines("tensor"):
        assert line == list(range(line[0], line[0] + mesh.tensor))
    for line in mesh.lines("pipeline"):
        assert all(after - before == mesh.tensor for before, after in itertools.pairwise(line))
    # A node with room for whole lines of tensor ranks, filled in the order of ranks, cuts none.
    room = nodes * mesh.tensor
    assert all(line[0] // room == line[-1] // room for line in mesh.lines("tensor"))


def test_one_process_stands_alone():
    assert ParallelContext() == ParallelContext(ALONE, ALONE, ALONE, Mesh()) and ParallelContext().counts
    assert Mesh().lines("tensor") == [[0]]
