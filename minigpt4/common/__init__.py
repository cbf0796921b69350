"""What every other room uses: configuration, registry, devices, logging, schedules, errors."""
