"""Written by ``python -m bench.ptx`` with NVRTC, release 12.0: do not edit."""

SOURCE_SHA256 = "c24b178d7c1b25ea7d5beaad99fbabcc6d812ea97c3b80a602279cd1b956dc47"
"""Of the `device_kernel.SOURCE` that this is."""

PTX = """.version 8.0
.target sm_75
.address_size 64
  // .globl  sdrt_step
.visible .entry sdrt_step(
  .param .u64 sdrt_step_param_0,
  .param .u64 sdrt_step_param_1,
  .param .u64 sdrt_step_param_2,
  .param .u64 sdrt_step_param_3,
  .param .u64 sdrt_step_param_4,
  .param .u64 sdrt_step_param_5,
  .param .u32 sdrt_step_param_6,
  .param .u32 sdrt_step_param_7
)
{
  .reg .pred   %p<15>;
  .reg .f32   %f<60>;
  .reg .b32   %r<68>;
  .reg .b64   %rd<78>;
  ld.param.u64   %rd27, [sdrt_step_param_0];
  ld.param.u64   %rd24, [sdrt_step_param_1];
  ld.param.u64   %rd28, [sdrt_step_param_2];
  ld.param.u64   %rd25, [sdrt_step_param_3];
  ld.param.u64   %rd29, [sdrt_step_param_4];
  ld.param.u64   %rd26, [sdrt_step_param_5];
  ld.param.u32   %r9, [sdrt_step_param_6];
  cvta.to.global.u64   %rd1, %rd29;
  cvta.to.global.u64   %rd2, %rd28;
  cvta.to.global.u64   %rd3, %rd27;
  ld.global.v2.u32   {%r11, %r12}, [%rd3];
  setp.ge.s32   %p1, %r11, %r12;
  @%p1 bra   $L__BB0_24;
  cvt.s64.s32   %rd6, %r11;
  ld.global.u64   %rd30, [%rd3+16];
  mul.wide.s32   %rd31, %r11, 52;
  add.s64   %rd32, %rd30, %rd31;
  add.s64   %rd7, %rd32, 4;
  ld.f32   %f1, [%rd32+8];
  ld.f32   %f2, [%rd32+20];
  ld.f32   %f3, [%rd32+24];
  ld.f32   %f4, [%rd32+32];
  ld.f32   %f5, [%rd32+36];
  ld.f32   %f6, [%rd32+40];
  ld.f32   %f7, [%rd32+44];
  ld.f32   %f8, [%rd32+48];
  mov.u32   %r2, %ntid.x;
  mov.u32   %r14, %ctaid.x;
  mov.u32   %r3, %tid.x;
  mad.lo.s32   %r67, %r14, %r2, %r3;
  setp.ge.u32   %p2, %r67, %r9;
  @%p2 bra   $L__BB0_20;
  cvta.to.global.u64   %rd8, %rd24;
  ld.f32   %f9, [%rd7];
  ld.f32   %f10, [%rd7+8];
  ld.f32   %f11, [%rd7+12];
  ld.global.u64   %rd9, [%rd3+24];
  ld.s32   %rd33, [%rd7+24];
  cvt.u64.u32   %rd34, %r9;
  ld.global.u64   %rd10, [%rd3+32];
  ld.global.u32   %rd35, [%rd3+12];
  mul.hi.s32   %r15, %r11, 1717986919;
  shr.u32   %r16, %r15, 31;
  shr.s32   %r17, %r15, 1;
  add.s32   %r18, %r17, %r16;
  mul.lo.s32   %r19, %r18, 5;
  sub.s32   %r20, %r11, %r19;
  cvt.s64.s32   %rd36, %r20;
  mul.lo.s64   %rd11, %rd36, %rd34;
  mov.u32   %r21, %nctaid.x;
  mul.lo.s32   %r5, %r21, %r2;
  add.s32   %r22, %r11, 5;
  mul.hi.s32   %r23, %r22, 1717986919;
  shr.u32   %r24, %r23, 31;
  shr.s32   %r25, %r23, 1;
  add.s32   %r26, %r25, %r24;
  mul.lo.s32   %r27, %r26, 5;
  sub.s32   %r28, %r22, %r27;
  cvt.s64.s32   %rd37, %r28;
  mul.lo.s64   %rd12, %rd37, %rd34;
  add.s32   %r29, %r11, 4;
  mul.hi.s32   %r30, %r29, 1717986919;
  shr.u32   %r31, %r30, 31;
  shr.s32   %r32, %r30, 1;
  add.s32   %r33, %r32, %r31;
  mul.lo.s32   %r34, %r33, 5;
  sub.s32   %r35, %r29, %r34;
  cvt.s64.s32   %rd38, %r35;
  mul.lo.s64   %rd13, %rd38, %rd34;
  add.s32   %r36, %r11, 3;
  mul.hi.s32   %r37, %r36, 1717986919;
  shr.u32   %r38, %r37, 31;
  shr.s32   %r39, %r37, 1;
  add.s32   %r40, %r39, %r38;
  mul.lo.s32   %r41, %r40, 5;
  sub.s32   %r42, %r36, %r41;
  cvt.s64.s32   %rd39, %r42;
  mul.lo.s64   %rd14, %rd39, %rd34;
  add.s32   %r43, %r11, 2;
  mul.hi.s32   %r44, %r43, 1717986919;
  shr.u32   %r45, %r44, 31;
  shr.s32   %r46, %r44, 1;
  add.s32   %r47, %r46, %r45;
  mul.lo.s32   %r48, %r47, 5;
  sub.s32   %r49, %r43, %r48;
  cvt.s64.s32   %rd40, %r49;
  mul.lo.s64   %rd15, %rd40, %rd34;
  add.s32   %r50, %r11, 1;
  mul.hi.s32   %r51, %r50, 1717986919;
  shr.u32   %r52, %r51, 31;
  shr.s32   %r53, %r51, 1;
  add.s32   %r54, %r53, %r52;
  mul.lo.s32   %r55, %r54, 5;
  sub.s32   %r56, %r50, %r55;
  cvt.s64.s32   %rd41, %r56;
  mul.lo.s64   %rd16, %rd41, %rd34;
  cvta.to.global.u64   %rd17, %rd25;
  mul.lo.s64   %rd18, %rd35, %rd6;
  mul.lo.s64   %rd19, %rd33, %rd34;
$L__BB0_3:
  .pragma "nounroll";
  ld.param.u32   %r66, [sdrt_step_param_7];
  cvt.u64.u32   %rd20, %r67;
  mul.wide.u32   %rd42, %r67, 4;
  add.s64   %rd21, %rd2, %rd42;
  ld.global.f32   %f12, [%rd21];
  add.s64   %rd43, %rd8, %rd42;
  add.s32   %r57, %r67, %r66;
  cvt.u64.u32   %rd22, %r57;
  mul.wide.u32   %rd44, %r57, 4;
  add.s64   %rd45, %rd8, %rd44;
  ld.global.f32   %f31, [%rd45];
  ld.global.f32   %f32, [%rd43];
  sub.rn.f32   %f33, %f31, %f32;
  mul.rn.f32   %f34, %f33, %f9;
  add.rn.f32   %f35, %f34, %f32;
  mul.rn.f32   %f52, %f35, %f10;
  setp.eq.f32   %p3, %f1, 0f00000000;
  @%p3 bra   $L__BB0_5;
  mul.rn.f32   %f36, %f12, %f1;
  add.rn.f32   %f52, %f52, %f36;
$L__BB0_5:
  add.s64   %rd46, %rd11, %rd20;
  shl.b64   %rd47, %rd46, 2;
  add.s64   %rd48, %rd1, %rd47;
  st.global.f32   [%rd48], %f52;
  mul.rn.f32   %f54, %f12, %f11;
  shl.b64   %rd49, %rd20, 2;
  add.s64   %rd23, %rd17, %rd49;
  setp.eq.f32   %p4, %f2, 0f00000000;
  @%p4 bra   $L__BB0_7;
  ld.global.f32   %f37, [%rd23];
  mul.rn.f32   %f38, %f37, %f2;
  add.rn.f32   %f54, %f54, %f38;
$L__BB0_7:
  setp.eq.f32   %p5, %f4, 0f00000000;
  @%p5 bra   $L__BB0_9;
  add.s64   %rd50, %rd12, %rd20;
  shl.b64   %rd51, %rd50, 2;
  add.s64   %rd52, %rd1, %rd51;
  ld.global.f32   %f39, [%rd52];
  mul.rn.f32   %f40, %f39, %f4;
  add.rn.f32   %f54, %f54, %f40;
$L__BB0_9:
  setp.eq.f32   %p6, %f5, 0f00000000;
  @%p6 bra   $L__BB0_11;
  add.s64   %rd53, %rd13, %rd20;
  shl.b64   %rd54, %rd53, 2;
  add.s64   %rd55, %rd1, %rd54;
  ld.global.f32   %f41, [%rd55];
  mul.rn.f32   %f42, %f41, %f5;
  add.rn.f32   %f54, %f54, %f42;
$L__BB0_11:
  setp.eq.f32   %p7, %f6, 0f00000000;
  @%p7 bra   $L__BB0_13;
  add.s64   %rd56, %rd14, %rd20;
  shl.b64   %rd57, %rd56, 2;
  add.s64   %rd58, %rd1, %rd57;
  ld.global.f32   %f43, [%rd58];
  mul.rn.f32   %f44, %f43, %f6;
  add.rn.f32   %f54, %f54, %f44;
$L__BB0_13:
  setp.eq.f32   %p8, %f7, 0f00000000;
  @%p8 bra   $L__BB0_15;
  add.s64   %rd59, %rd15, %rd20;
  shl.b64   %rd60, %rd59, 2;
  add.s64   %rd61, %rd1, %rd60;
  ld.global.f32   %f45, [%rd61];
  mul.rn.f32   %f46, %f45, %f7;
  add.rn.f32   %f54, %f54, %f46;
$L__BB0_15:
  setp.eq.f32   %p9, %f8, 0f00000000;
  @%p9 bra   $L__BB0_17;
  add.s64   %rd62, %rd16, %rd20;
  shl.b64   %rd63, %rd62, 2;
  add.s64   %rd64, %rd1, %rd63;
  ld.global.f32   %f47, [%rd64];
  mul.rn.f32   %f48, %f47, %f8;
  add.rn.f32   %f54, %f54, %f48;
$L__BB0_17:
  setp.eq.f32   %p10, %f3, 0f00000000;
  @%p10 bra   $L__BB0_19;
  add.s64   %rd65, %rd19, %rd20;
  shl.b64   %rd66, %rd65, 2;
  add.s64   %rd67, %rd9, %rd66;
  ld.f32   %f49, [%rd67];
  mul.rn.f32   %f50, %f49, %f3;
  add.rn.f32   %f54, %f54, %f50;
$L__BB0_19:
  ld.param.u32   %r64, [sdrt_step_param_6];
  st.global.f32   [%rd23], %f12;
  st.global.f32   [%rd21], %f54;
  shl.b64   %rd68, %rd22, 2;
  add.s64   %rd69, %rd2, %rd68;
  st.global.f32   [%rd69], %f54;
  add.s64   %rd70, %rd18, %rd20;
  shl.b64   %rd71, %rd70, 2;
  add.s64   %rd72, %rd10, %rd71;
  st.f32   [%rd72], %f54;
  cvt.u32.u64   %r58, %rd20;
  add.s32   %r67, %r58, %r5;
  setp.lt.u32   %p11, %r67, %r64;
  @%p11 bra   $L__BB0_3;
$L__BB0_20:
  mov.u32   %r65, %tid.x;
  bar.sync   0;
  setp.ne.s32   %p12, %r65, 0;
  @%p12 bra   $L__BB0_24;
  membar.gl;
  add.s64   %rd73, %rd3, 8;
  atom.global.add.u32   %r59, [%rd73], 1;
  mov.u32   %r60, %nctaid.x;
  add.s32   %r61, %r60, -1;
  setp.ne.s32   %p13, %r59, %r61;
  @%p13 bra   $L__BB0_24;
  mov.u32   %r62, 0;
  st.global.u32   [%rd3+8], %r62;
  add.s32   %r8, %r11, 1;
  st.global.u32   [%rd3], %r8;
  ld.global.u32   %r63, [%rd3+4];
  setp.ge.s32   %p14, %r8, %r63;
  @%p14 bra   $L__BB0_24;
  ld.global.u64   %rd74, [%rd3+16];
  mul.wide.s32   %rd75, %r8, 52;
  add.s64   %rd76, %rd74, %rd75;
  ld.f32   %f51, [%rd76];
  cvta.to.global.u64   %rd77, %rd26;
  st.global.f32   [%rd77], %f51;
$L__BB0_24:
  ret;
}
"""
