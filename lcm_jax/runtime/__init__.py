"""What a long run needs: device mesh, checkpoints, measurements, its folder. Knows neither models nor method."""
