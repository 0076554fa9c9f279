// Hex dumps, as text and back: used by the golden tests and, through `include!`, by the examples in
// docs/format.md.

/// The bytes of the dump that stands under the line `LABEL (...)` in `text`: an offset, two blanks and up to
/// sixteen bytes a line; `*` stands for repetitions of the line above it up to the next offset.
pub(crate) fn dump_of(text: &str, label: &str) -> Vec<u8> {
    let mut lines = text.lines().skip_while(|line| !line.starts_with(&format!("{label} (")));
    assert!(lines.next().is_some(), "no dump {label:?}");
    let mut bytes: Vec<u8> = Vec::new();
    let mut repeat = false;
    for line in lines.take_while(|line| !line.starts_with("```")) {
        if line == "*" {
            repeat = true;
            continue;
        }
        let (offset, rest) = line.split_at_checked(8).expect("an offset");
        let offset = usize::from_str_radix(offset, 16).expect("an offset in hexadecimal");
        if repeat {
            let last = bytes[bytes.len() - 16..].to_vec();
            while bytes.len() < offset {
                bytes.extend_from_slice(&last);
            }
            repeat = false;
        }
        assert_eq!(bytes.len(), offset, "the dump {label:?} has a gap");
        let hex = rest.trim_start().split("  ").next().unwrap_or("");
        bytes.extend(hex.split_whitespace().map(|b| u8::from_str_radix(b, 16).expect("a byte")));
    }
    bytes
}

/// Bytes as a dump that [`dump_of`] reads.
#[allow(dead_code, reason = "the examples only read dumps")]
pub(crate) fn dump(bytes: &[u8]) -> String {
    let mut out = String::new();
    let mut last: Option<&[u8]> = None;
    let mut repeated = false;
    for (index, line) in bytes.chunks(16).enumerate() {
        if last == Some(line) && line.len() == 16 {
            if !repeated {
                out += "*\n";
            }
            repeated = true;
            continue;
        }
        (last, repeated) = (Some(line), false);
        let hex: Vec<String> = line.iter().map(|byte| format!("{byte:02x}")).collect();
        let text: String = line
            .iter()
            .map(
                |&byte| {
                    if byte.is_ascii_graphic() || byte == b' ' { char::from(byte) } else { '.' }
                },
            )
            .collect();
        out += &format!("{:08x}  {:<47}  |{text}|\n", index * 16, hex.join(" "));
    }
    out += &format!("{:08x}\n", bytes.len());
    out
}
