"""Write figures/preregistration.md from the claims that study notebooks declare; claims that it holds keep their date."""
from pathlib import Path

from hapnb.claims import write_preregistration

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    print(write_preregistration((ROOT / "nbs" / "studies").glob("*.ipynb"), ROOT / "figures" / "preregistration.md"))
