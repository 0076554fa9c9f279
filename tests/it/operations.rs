//! Random sequences of operations, every answer compared with a plain model's: what the fuzzer
//! `ops_vs_model` does, for some seeds.

#[test]
fn random_operations_agree_with_a_plain_model() {
    let seed = std::env::var("HEADWATER_SEED").ok().map(|seed| seed.parse::<u64>().unwrap());
    for seed in seed.map_or(0..200, |seed| seed..seed + 1) {
        let mut rng = fastrand::Rng::with_seed(seed);
        let input: Vec<u8> = (0..rng.usize(20..400)).map(|_| rng.u8(..)).collect();
        println!("seed {seed}");
        headwater::fuzzing::ops_vs_model(&input);
    }
}
