"""Files for Prometheus and Grafana that watch a cluster and its runs."""
