"""Table 1 of the LCM paper (arXiv 2310.04378): 512 x 512 pixels, LAION-Aesthetics 6+, w = 8, in 1, 2, 4 and 8 steps."""

NOTE = (
    "Confirmed by a second source: FID of DDIM in 2 and 4 steps, DPM-Solver in 2, DPM-Solver++ in 4, Guided-Distill in "
    "2 and 4, LCM in 1, 2, 4 and 8; CLIP score in 4 steps of DDIM, Guided-Distill and LCM. The other cells are not yet "
    "checked against the paper."
)
# method -> (FID, CLIP score), each in 1, 2, 4, 8 steps
ROWS = {
    "DDIM": ((183.29, 81.05, 22.38, 13.83), (6.03, 14.13, 25.89, 29.29)),
    "DPM-Solver": ((185.78, 72.81, 18.53, 12.24), (6.35, 15.10, 26.64, 29.54)),
    "DPM-Solver++": ((185.78, 72.81, 18.43, 12.20), (6.35, 15.10, 26.64, 29.55)),
    "Guided-Distill": ((108.21, 33.25, 15.12, 13.89), (12.08, 22.71, 27.25, 28.17)),
    "LCM": ((35.36, 13.31, 11.10, 11.84), (24.14, 27.83, 28.69, 28.84)),
}
