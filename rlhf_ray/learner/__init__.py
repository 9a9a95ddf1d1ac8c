"""Scored groups become an updated policy and critic, on Ray Train and FSDP2."""
