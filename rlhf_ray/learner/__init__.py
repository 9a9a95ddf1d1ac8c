"""Stage 5 of the loop: scored groups become an updated policy and critic, on Ray Train and FSDP2."""
