"""Loops of machine code, in the formats of nvdisasm and of libtpu's dumps."""

from tests.compile.machine_code import product_loops, read_bundles

SASS = """
.L_x_0:
        -:-:-:Y:01        /*0000*/               MOV R1, R2 ;
.L_x_1:
        -:-:-:Y:01        /*0010*/               SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R2 ;
        2:-:-:Y:05        /*0020*/          @!P1 BRA `(.L_x_1) ;
        -:-:-:Y:01        /*0030*/               HGMMA.64x8x16.F32.BF16 R24, gdesc[UR8], R24 ;
        -:-:-:Y:01        /*0040*/               HGMMA.64x8x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        -:-:-:Y:01        /*0050*/           @P0 BRA `(.L_x_0) ;
        -:-:-:Y:01        /*0060*/               EXIT ;
.L_x_2:
        -:-:-:Y:01        /*0070*/               NANOSLEEP 0x10 ;
        -:-:-:Y:01        /*0080*/               BRA `(.L_x_1) ;
"""
BUNDLES = """
     0   :  { %s1 = sld [smem:[#allocation0]] }
   0x1 LB: > { %s2 = sphi 0 } /* Start region 1 */
   0x2   : > { %10 = sbr.rel (%p1) target = $region5 }
   0x3   : > {}
   0x4   : > {}
   0x5   : > {}
   0x6   : > {}
   0x7   : > { %v1 = vld [vmem:[#allocation2]]
 second_minor_factor: 1 */ } /* Start region 3 */
   0x8 LB: >> { %v2 = vmatmul.bf16 %v1 } /* Start region 4 */
   0x9   : >> { %11 = sbr.rel (!%p2) target = $region4 }
   0xa PF: > { %v3 = vadd.f32 %v2, %v1 } /* Start/End empty region 5 */
   0xb   : > { %12 = sbr.rel (!%p3) target = $region1 }
   0xc   :  { %v4 = vst %v3 }
"""


def test_waits_are_a_part_of_the_loop_that_multiplies() -> None:
    """The code after the loop goes back into it, and is no loop."""
    (loop,) = product_loops(SASS)
    assert loop.instructions == 6
    assert loop.multiplied == 2 * 64 * 8 * 16
    assert loop.product == "HGMMA"


def test_bundles_belong_to_loops() -> None:
    kernel = read_bundles(BUNDLES)
    (outer,) = kernel.inner
    (inner,) = outer.inner
    assert (kernel.bundles, outer.bundles, inner.bundles) == (2, 9, 2)
    assert outer.cycles(10) == 9 + 20


def test_a_branch_skips_bundles_after_its_delay() -> None:
    (outer,) = read_bundles(BUNDLES).inner
    assert outer.skippable == 1
