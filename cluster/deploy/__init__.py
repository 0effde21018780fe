"""Manifests that bring a run onto a cluster that someone else operates: Kubernetes with KubeRay, Slurm, `ray up`."""
