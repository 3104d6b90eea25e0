"""Where a run runs: processes, devices, the CPU runtime of megatron-core, seeds."""
