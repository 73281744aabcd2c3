"""What a long run needs: device mesh, checkpoints, measurements, its folder. Knows no method, and of models
only the UNet that it finds attention for."""
