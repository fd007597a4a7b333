import { t } from "../i18n";
import { chooseLanguage, chooseTheme, language, theme, type Language, type Theme } from "../preferences";

interface ChoiceProps<Value extends string> {
  label: string;
  options: readonly (readonly [Value, string])[];
  value: Value;
  choose: (value: Value) => void;
}

/** A segmented control: all options are visible, one is selected. */
export function Choice<Value extends string>({ label, options, value, choose }: ChoiceProps<Value>) {
  return (
    <div class="choice" role="group" aria-label={label}>
      {options.map(([option, text]) => (
        <button key={option} type="button" aria-pressed={option === value} onClick={() => choose(option)}>
          {text}
        </button>
      ))}
    </div>
  );
}

// Each language is named in that language.
const LANGUAGES = [["en", "English"], ["zh-CN", "中文"]] as const satisfies readonly (readonly [Language, string])[];

export function LanguageSwitch() {
  return <Choice label={t().settings.language} options={LANGUAGES} value={language.value} choose={chooseLanguage} />;
}

export function ThemeSwitch() {
  const texts = t().settings;
  const options = [["system", texts.system], ["light", texts.light], ["dark", texts.dark]] as const satisfies
    readonly (readonly [Theme, string])[];
  return <Choice label={texts.theme} options={options} value={theme.value} choose={chooseTheme} />;
}
