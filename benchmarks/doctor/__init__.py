"""What this machine can run: packages, devices, disks, data and weights, results. Nothing is downloaded or changed."""
